"""The same train step in PyTorch: transformers' LlamaForCausalLM under torch.compile, AdamW, clip.

Run it in an environment of its own (pip install torch transformers), in one sitting with
`benchmarks.train_step`:

    python benchmarks/peer_transformers.py --batch 16 --length 256

The model is configs/model/stories-15m.yaml: 288 wide, 6 layers, 6 heads, 32,000 tokens, tied.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="predicted tokens per row")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=288, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6, intermediate_size=768, max_position_embeddings=256,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    forward = model if args.eager else torch.compile(model)
    tokens = torch.randint(0, 32000, (args.batch, args.length + 1))
    seconds = []
    for i in range(args.steps + 2):  # two to compile and warm up
        start = time.perf_counter()
        logits = forward(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(),
                      "seconds_per_step": round(statistics.median(seconds), 4)}))  # fmt: skip


if __name__ == "__main__":
    main()
