"""What jllama's errors tell a user to do with peft or torch, done.

    python -m tests.peers.scripts.remedies JOBS.json

Each job of the JSON list has what to `do`:

  merge       trains the adapter of peft's config `make` over a random model of `config`, saves both
              to `base` and `adapter`, opens them again and saves the merged model to `to`
  merge_live  the same, but merges the trained model itself
  convert     the same, but saves it to `to` as an adapter of the old base, with peft's
              path_initial_model_for_weight_conversion
  repeat      the same, but saves to `to` a base with its layers as layer_replication repeats them
  read        the same, without `to`
  save_again  reads `file` with torch.load, and writes contiguous tensors to `to` with torch.save

All but the last write `out`, an .npz with the float32 `logits` of the trained model for a row `ids`
at `positions`. The error of a job, if it has one, goes to the file `error`.
"""

import copy
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_config, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoModelForCausalLM

from tests.peers.scripts import models


def _open(base: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def _initialised(job: dict) -> PeftModel:
    """The adapter over its base, as it is before training."""
    arguments = {"task_type": "CAUSAL_LM", "peft_type": "LORA"} | job["make"]
    model, config = _open(job["base"]), get_peft_config(arguments)
    ids = torch.tensor([job["ids"]])
    if job["make"].get("init_lora_weights") == "lora_ga":
        preprocess_loraga(model, config, lambda: model(ids, labels=ids).loss.backward())
    return get_peft_model(model, config)


def train(model: PeftModel, seed: int) -> None:
    """Moves all that is trained by random numbers of a tenth of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def repeat(base: str, adapter: str, to: str) -> None:
    """As docs/interop.md does it."""
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    model = _open(base)
    layers = model.model.layers
    numbers = [n for first, end in config["layer_replication"] for n in range(first, end)]
    model.model.layers = torch.nn.ModuleList(copy.deepcopy(layers[n]) for n in numbers)
    model.config.num_hidden_layers = len(numbers)
    model.save_pretrained(to)


def adapt(job: dict) -> None:
    do, base, adapter = job["do"], job["base"], job["adapter"]
    models.random_model(models.config(**job["config"]), 0.1, job["seed"]).save_pretrained(base)
    model = _initialised(job)
    if do == "convert":  # as its documentation has it: saved before training
        initial, config = Path(job["to"]).parent / "initial", model.peft_config["default"]
        kind, config.init_lora_weights = config.init_lora_weights, True
        model.save_pretrained(initial)
        config.init_lora_weights = kind
    train(model, job["seed"])
    np.savez(job["out"], logits=models.run(model, job["ids"], job["positions"]))
    model.save_pretrained(adapter)
    match do:
        case "merge":
            opened = PeftModel.from_pretrained(_open(base), adapter)
            opened.merge_and_unload().save_pretrained(job["to"])
        case "merge_live":
            model.merge_and_unload().save_pretrained(job["to"])
        case "convert":
            initial = str(initial)
            model.save_pretrained(job["to"], path_initial_model_for_weight_conversion=initial)
        case "repeat":
            repeat(base, adapter, job["to"])


def save_again(file: str, to: str) -> None:
    tensors = torch.load(file, weights_only=True)
    torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, to)


def main(jobs: list[dict]) -> None:
    for job in jobs:
        if job["do"] == "save_again":
            save_again(job["file"], job["to"])
            continue
        try:
            adapt(job)
        except Exception as e:
            Path(job["error"]).write_text(f"{type(e).__name__}: {e}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(json.loads(Path(sys.argv[1]).read_text()))
