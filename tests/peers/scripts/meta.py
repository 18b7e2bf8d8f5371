"""Folders as Meta released them, and a LLaMA over their names and layout to say what they compute.

    python -m tests.peers.scripts.meta JOBS.json

Nothing of transformers is in here: queries and keys are turned as complex numbers whose real and
imaginary parts lie side by side, as the papers' own code does it. Each job of the JSON list writes
a `folder` of random weights, and `out`, an .npz with the float64 `logits` of `ids` at `positions`.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

# The shards of a matrix: cut by rows where outputs are spread over devices, else by columns.
BY_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
BY_COLUMNS = ("wo", "w2")
# Llama-3.1's scaled frequencies; params.json says no more than that they are scaled.
ORIGINAL_LENGTH, LOW, HIGH = 8192, 1.0, 4.0


def ffn_dim(params: dict) -> int:
    """The feed-forward width, which params.json has as a multiplier and a multiple."""
    width = int(2 * 4 * params["dim"] / 3)
    width = int(params.get("ffn_dim_multiplier", 1) * width)
    multiple = params["multiple_of"]
    return multiple * math.ceil(width / multiple)


def random_weights(params: dict, vocab_size: int, std: float, seed: int) -> dict:
    """float32; matrices normal with `std`, norms' scales around one."""
    generator = torch.Generator().manual_seed(seed)
    d, n, f = params["dim"], params["dim"] // params["n_heads"], ffn_dim(params)
    kv = n * params.get("n_kv_heads", params["n_heads"])

    def matrix(*shape):
        return std * torch.randn(shape, generator=generator)

    def scale():
        return 1 + 0.1 * torch.randn(d, generator=generator)

    weights = {"tok_embeddings.weight": matrix(vocab_size, d)}
    for i in range(params["n_layers"]):
        layer = {
            "attention.wq": matrix(d, d),
            "attention.wk": matrix(kv, d),
            "attention.wv": matrix(kv, d),
            "attention.wo": matrix(d, d),
            "feed_forward.w1": matrix(f, d),
            "feed_forward.w2": matrix(d, f),
            "feed_forward.w3": matrix(f, d),
            "attention_norm": scale(),
            "ffn_norm": scale(),
        }
        weights |= {f"layers.{i}.{name}.weight": w for name, w in layer.items()}
    return weights | {"norm.weight": scale(), "output.weight": matrix(vocab_size, d)}


def frequencies(params: dict, factor: float) -> torch.Tensor:
    """Radians per position of each pair, float64; `factor` is that of scaled RoPE."""
    n = params["dim"] // params["n_heads"]
    out = []
    for i in range(n // 2):
        f = params.get("rope_theta", 1e4) ** (-2 * i / n)
        if params.get("use_scaled_rope"):
            wavelength = 2 * math.pi / f
            smooth = (ORIGINAL_LENGTH / wavelength - LOW) / (HIGH - LOW)
            smooth = min(max(smooth, 0.0), 1.0)
            f = (1 - smooth) * f / factor + smooth * f
        out.append(f)
    return torch.tensor(out, dtype=torch.float64)


@torch.no_grad()
def logits(params: dict, weights: dict, ids: list[int], factor: float = 8.0) -> torch.Tensor:
    """[T,V] float64 of one row of ids."""
    w = {name: value.double() for name, value in weights.items()}
    heads, kv_heads = params["n_heads"], params.get("n_kv_heads", params["n_heads"])
    n, t = params["dim"] // heads, len(ids)
    angles = torch.outer(torch.arange(t, dtype=torch.float64), frequencies(params, factor))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    mask = torch.full((t, t), -torch.inf, dtype=torch.float64).triu(1)

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * w[name]

    def turned(x):
        pairs = torch.view_as_complex(x.reshape(t, -1, n // 2, 2))
        return torch.view_as_real(pairs * turn).reshape(t, -1, n)

    x = w["tok_embeddings.weight"][ids]
    for i in range(params["n_layers"]):
        layer = f"layers.{i}."
        h = norm(x, layer + "attention_norm.weight")
        q, k, v = (h @ w[f"{layer}attention.w{name}.weight"].T for name in "qkv")
        q, k, v = turned(q), turned(k), v.reshape(t, kv_heads, n)
        k, v = (a.repeat_interleave(heads // kv_heads, 1) for a in (k, v))
        scores = torch.einsum("thn,shn->hts", q, k) / math.sqrt(n) + mask
        mixed = torch.einsum("hts,shn->thn", scores.softmax(-1), v)
        x = x + mixed.reshape(t, -1) @ w[layer + "attention.wo.weight"].T
        h = norm(x, layer + "ffn_norm.weight")
        gate, down, up = (w[f"{layer}feed_forward.w{j}.weight"] for j in (1, 2, 3))
        x = x + (torch.nn.functional.silu(h @ gate.T) * (h @ up.T)) @ down.T
    return norm(x, "norm.weight") @ w["output.weight"].T


def save(folder: Path, params: dict, weights: dict, shards: int, embedding_axis: int) -> None:
    """params.json and consolidated.NN.pth, cut as model parallelism cuts them.

    `embedding_axis` is 1 in LLaMA and Llama-2, and 0 in Llama-3.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    pieces = [{} for _ in range(shards)]
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        axis = embedding_axis if kind == "tok_embeddings" else 0 if kind in BY_ROWS else 1
        cut = kind in (*BY_ROWS, *BY_COLUMNS, "tok_embeddings")
        parts = weight.chunk(shards, axis) if cut else [weight] * shards
        for piece, part in zip(pieces, parts, strict=True):
            piece[name] = part.clone()
    freqs = frequencies({**params, "use_scaled_rope": False}, 1.0)
    for i, piece in enumerate(pieces):
        torch.save(piece | {"rope.freqs": freqs.bfloat16()}, folder / f"consolidated.{i:02}.pth")


def hugging_face(params: dict, weights: dict) -> dict:
    """The same weights under Hugging Face's names and with its order of rows.

    There pair i of a head is made of rows i and i + N/2, here of rows 2i and 2i + 1.
    """
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    n = params["dim"] // params["n_heads"]
    out = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    for i in range(params["n_layers"]):
        for ours, theirs in names.items():
            weight = weights[f"layers.{i}.{ours}.weight"]
            if ours in ("attention.wq", "attention.wk"):
                heads = weight.unflatten(0, (-1, n))
                weight = torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).flatten(0, 1)
            out[f"model.layers.{i}.{theirs}.weight"] = weight.contiguous()
    return out


def main(jobs: list[dict]) -> None:
    for job in jobs:
        params = job["params"]
        weights = random_weights(params, job["vocab_size"], job["std"], job["seed"])
        weights = {k: w.to(getattr(torch, job["dtype"])) for k, w in weights.items()}
        save(Path(job["folder"]), params, weights, job["shards"], job["embedding_axis"])
        out = logits(params, weights, job["ids"], job.get("factor", 8.0))
        np.savez(job["out"], logits=out[job["positions"]].numpy())


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
