"""peft's adapters of random LLaMAs: made, opened, merged.

    python -m tests.peers.scripts.adapters JOBS.json

Each job has `base`, a folder of a model, and `adapter`, one of an adapter; it writes `out`, an .npz
with the logits of one row `ids` at `positions`: `logits` (float64, computed in float64 throughout),
`logits32` (float32) and `merged` (float64, of what merge_and_unload makes). With `merged_to` the
merged float32 model is saved there. With `make`, the arguments of a LoraConfig, `adapter` is made
first, of random numbers by `seed`; with `config` so is `base`, with `std`.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.peers.scripts import models
from tests.peers.scripts.float64 import Float64


def make(
    base: Path, adapter: Path, arguments: dict, seed: int, name: str | None = None, **save
) -> None:
    """An adapter that changes the model by a few parts in ten; `name` stands in it for the base."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **arguments))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "modules_to_save" in key or "magnitude" in key:
                p.mul_(1 + 0.1 * noise)
            elif "lora_" in key:
                # So that the product of the factors is of the size of the base's matrices.
                p.copy_(0.1 * noise)
    model.peft_config["default"].base_model_name_or_path = name or str(base)
    model.save_pretrained(adapter, **save)
    (adapter / "README.md").unlink(missing_ok=True)


def logits(base: Path, adapter: Path, ids: list[int], positions: list[int], merged_to=None) -> dict:
    """What `out` of a job holds."""
    single = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with Float64():
        double = AutoModelForCausalLM.from_config(single.config).double()
    double.load_state_dict(single.state_dict())
    single, double = (
        PeftModel.from_pretrained(m, adapter, autocast_adapter_dtype=False)
        for m in (single, double)
    )
    double = double.double()
    out = {"logits32": models.run(single, ids, positions)}
    with Float64():
        out["logits"] = models.run(double, ids, positions)
        out["merged"] = models.run(double.merge_and_unload(), ids, positions)
    assert out["logits"].dtype == out["merged"].dtype == np.float64
    if merged_to:
        single.merge_and_unload().save_pretrained(merged_to)
    return out


def main(jobs: list[dict]) -> None:
    for job in jobs:
        base, adapter = Path(job["base"]), Path(job["adapter"])
        if "config" in job:
            config = models.config(**job["config"])
            models.random_model(config, job["std"], job["seed"]).save_pretrained(base)
        if "make" in job:
            make(base, adapter, job["make"], job["seed"])
        out = logits(base, adapter, job["ids"], job["positions"], job.get("merged_to"))
        np.savez(job["out"], **out)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(json.loads(Path(sys.argv[1]).read_text()))
