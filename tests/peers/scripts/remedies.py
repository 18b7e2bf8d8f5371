"""What jllama's errors tell a user to do with peft or torch, done.

    python -m tests.peers.scripts.remedies JOBS.json

Each job of the JSON list has what to `do`:

  merge       trains the adapter of peft's config `make` over a random model of `config`, saves both
              to `base` and `adapter`, and the merged model to `to`
  convert     the same, but saves it to `to` as an adapter of the old base, with peft's
              path_initial_model_for_weight_conversion
  repeat      the same, but saves to `to` a base with its layers as layer_replication repeats them
  read        the same, without `to`
  save_again  reads `file` with torch.load, and writes contiguous tensors to `to` with torch.save

The first four write `out`, an .npz with the float32 `logits` of the trained model for a row `ids`
at `positions`.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_config, get_peft_model
from transformers import AutoModelForCausalLM

from tests.peers.scripts import models


def _open(base: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def train(model: PeftModel, seed: int) -> None:
    """Moves all that is trained by random numbers of a tenth of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def merge(base: str, adapter: str, to: str, **_) -> None:
    PeftModel.from_pretrained(_open(base), adapter).merge_and_unload().save_pretrained(to)


def repeat(base: str, adapter: str, to: str, **_) -> None:
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    numbers = [n for start, end in config["layer_replication"] for n in range(start, end)]
    model = _open(base)
    layers = model.state_dict()
    model.config.num_hidden_layers = len(numbers)
    model = AutoModelForCausalLM.from_config(model.config)
    own = {
        name: layers[_layer(name, numbers) if ".layers." in name else name]
        for name in model.state_dict()
    }
    model.load_state_dict(own)
    model.save_pretrained(to)


def _layer(name: str, numbers: list[int]) -> str:
    parts = name.split(".")
    parts[2] = str(numbers[int(parts[2])])
    return ".".join(parts)


def _adapt(job: dict) -> None:
    models.random_model(models.config(**job["config"]), 0.1, job["seed"]).save_pretrained(
        job["base"]
    )
    arguments = {"task_type": "CAUSAL_LM", "peft_type": "LORA"} | job["make"]
    model = get_peft_model(_open(job["base"]), get_peft_config(arguments))
    if job["do"] == "convert":  # as its documentation has it: saved before training
        initial, config = Path(job["to"]).parent / "initial", model.peft_config["default"]
        kind, config.init_lora_weights = config.init_lora_weights, True
        model.save_pretrained(initial)
        config.init_lora_weights = kind
    train(model, job["seed"])
    np.savez(job["out"], logits=models.run(model, job["ids"], job["positions"]))
    model.save_pretrained(job["adapter"])
    if job["do"] == "convert":
        model.save_pretrained(job["to"], path_initial_model_for_weight_conversion=str(initial))
    elif job["do"] != "read":
        {"merge": merge, "repeat": repeat}[job["do"]](**job)


def save_again(file: str, to: str, **_) -> None:
    tensors = torch.load(file, weights_only=True)
    torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, to)


def main(jobs: list[dict]) -> None:
    for job in jobs:
        if job["do"] == "save_again":
            save_again(**job)
        else:
            _adapt(job)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(json.loads(Path(sys.argv[1]).read_text()))
