"""Times the same train step in PyTorch: transformers' LlamaForCausalLM, AdamW, gradient clipping.

It runs in an environment of its own, which `make bench` installs:

    python benchmarks/peer_transformers.py --model configs/model/stories-15m.yaml --batch 16 \
        --length 256

It uses torch.compile, unless --eager. bfloat16 is autocast over float32 parameters. Attention is
PyTorch's scaled_dot_product_attention, on CUDA restricted to its flash kernel.
"""

import argparse
import contextlib
import json
import resource
import statistics
import time
from pathlib import Path

import torch
import transformers
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM


def llama_config(path: Path) -> LlamaConfig:
    """The config of transformers for a file of configs/model."""
    c = yaml.safe_load(path.read_text())
    rope = {"rope_type": "default", "rope_theta": c["rope_theta"]}
    if c["rope"]["kind"] == "llama3":
        rope |= {
            "rope_type": "llama3",
            "factor": c["rope"]["factor"],
            "low_freq_factor": c["rope"]["low_freq_factor"],
            "high_freq_factor": c["rope"]["high_freq_factor"],
            "original_max_position_embeddings": c["rope"]["original_length"],
        }
    return LlamaConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_dim"],
        num_hidden_layers=c["num_layers"],
        num_attention_heads=c["num_heads"],
        num_key_value_heads=c["num_kv_heads"],
        head_dim=c["head_dim"],
        intermediate_size=c["ffn_dim"],
        max_position_embeddings=c["max_length"],
        rms_norm_eps=c["rms_norm_eps"],
        tie_word_embeddings=c["tie_embeddings"],
        rope_parameters=rope,
        attn_implementation="sdpa",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a file of configs/model")
    parser.add_argument("--batch", type=int, default=16, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="predicted tokens per row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each block")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.manual_seed(0)
    config = llama_config(args.model)
    model = LlamaForCausalLM(config).float().to(device).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=cuda
    )

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        targets = tokens[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets)

    loss_of = loss_of if args.eager else torch.compile(loss_of)
    tokens = torch.randint(0, config.vocab_size, (args.batch, args.length + 1), device=device)
    low = args.dtype == "bfloat16"
    seconds = []
    for i in range(args.steps + 2):  # two to compile and warm up
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if cuda else contextlib.nullcontext()
        with flash, torch.autocast(device, torch.bfloat16, enabled=low):
            loss = loss_of(tokens)
            loss.backward()  # in the context too, so that recomputation uses the same kernel
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mode": "eager" if args.eager else "compile",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "seconds_per_step": round(statistics.median(seconds), 4),
        "seconds_per_step_min": round(min(seconds), 4),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else peak,
        "loss": loss.item(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
