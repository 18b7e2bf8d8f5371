"""Random LLaMAs of transformers, and the logits of any folder that transformers can open.

    python -m tests.peers.scripts.models JOBS.json

Runs under transformers 4 and 5. JOBS.json is a list of jobs; each writes `out`, an .npz with
`logits` (float64, computed in float64 throughout), `logits32` (float32) and `inv_freq`, all of one
row `ids`, the logits at `positions` only. With `make` in a job its `folder` is written first.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.peers.scripts.float64 import Float64

OLD = transformers.__version__.startswith("4.")


def config(rope: dict, **fields) -> LlamaConfig:
    """`rope`: transformers' rope_parameters, written as this version writes them."""
    if not OLD:
        return LlamaConfig(rope_parameters=rope, **fields)
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    scaling = None if scaling["rope_type"] == "default" else scaling
    return LlamaConfig(rope_theta=rope["rope_theta"], rope_scaling=scaling, **fields)


def random_model(config: LlamaConfig, std: float, seed: int) -> LlamaForCausalLM:
    """float32; matrices normal with `std`, norms' scales around one."""
    model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if p.ndim == 1 else std * noise)
    return model


def logits(folder: str | Path, ids: list[int], positions: list[int]) -> dict[str, np.ndarray]:
    """What `out` of a job holds."""
    single = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with Float64():
        double = AutoModelForCausalLM.from_config(single.config).double()
    double.load_state_dict(single.state_dict())
    with Float64():
        exact = run(double, ids, positions)
    assert double.model.rotary_emb.inv_freq.dtype == torch.float64 and exact.dtype == np.float64
    return {
        "logits": exact,
        "logits32": run(single, ids, positions),
        "inv_freq": single.model.rotary_emb.inv_freq.numpy(),
    }


@torch.no_grad()
def run(model, ids, positions):
    out = model.eval()(torch.tensor([ids]), logits_to_keep=torch.tensor(positions))
    return out.logits[0].numpy()


def main(jobs: list[dict]) -> None:
    for job in jobs:
        if "make" in job:
            model = random_model(config(**job["make"]["config"]), job["make"]["std"], job["seed"])
            model.save_pretrained(job["folder"])
        out = logits(job["folder"], job["ids"], job["positions"])
        np.savez(job["out"], **out)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
