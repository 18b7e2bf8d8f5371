"""Recipes of runs that take seconds: in memory, or with a little text on disk."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import tiny
import yaml

from jllama.config import Config
from jllama.config import recipe as recipes

_OPTIMIZER = {
    "kind": "adamw",
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}


def in_memory(*overrides: str, **model) -> Config:
    """A recipe whose batches are `batch`; overrides are dotted key=value."""
    sizes = {"vocab_size": 96, "num_layers": 2, "num_kv_heads": 2, "max_length": 64} | model
    data = {
        "model": recipes.to_dict(tiny.config(**sizes)),
        "compute": {"dtype": "float32"},
        "tokenizer": {"kind": "file", "path": "unused"},
        "data": {
            "length": 12,
            "packing": {"kind": "cut"},
            "train": [{"name": "unused", "source": {"kind": "text", "files": ["unused"]}}],
        },
        "training": {
            "steps": 20,
            "batch_size": 8,
            "optimizer": dict(_OPTIMIZER),
            "schedule": {"kind": "cosine", "peak": 1e-2, "warmup_steps": 2, "floor": 0.1},
        },
        "run": {"name": "test"},
    }
    return recipes.validate(Config, recipes.override(data, overrides), "test")


def batch(config: Config, step: int = 0) -> dict[str, np.ndarray]:
    """Random rows of two segments and a tail of padding; each row weighs less than the last."""
    rng = np.random.default_rng(step)
    shape = (config.training.batch_size, config.data.length + 1)
    index = np.arange(shape[1])
    cut, end = rng.integers(2, shape[1] // 2, (2, shape[0], 1))
    segments = np.where(index < cut, 1, np.where(index < shape[1] - end, 2, 0)).astype(np.int32)
    weights = rng.random(shape, np.float32) * (rng.random(shape) < 0.8)
    weights /= np.arange(1, shape[0] + 1)[:, None]
    weights = np.where((segments == 0) | (index == 0) | (index == cut), 0, weights)
    tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    return {
        "tokens": np.where(segments == 0, 0, tokens),
        "segments": segments,
        "weights": weights.astype(np.float32),
    }


def texts(count: int, seed: int) -> list[str]:
    """Something to learn, with letters of several bytes in it."""
    pick = random.Random(seed)
    words = [
        "def",
        "return",
        "self",
        "if",
        "not in",
        "number",
        "straße",
        "naïve",
        "数据",
        "x",
        "y",
        "0",
    ]
    return [
        "".join(
            " ".join(pick.choices(words, k=pick.randint(1, 7))) + "\n"
            for _ in range(pick.randint(1, 8))
        )
        for _ in range(count)
    ]


def on_disk(folder: Path, **model) -> Path:
    """Writes two text files and a recipe that trains ten steps on them; gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", 200, 1), ("held_out", 12, 2)):
        (folder / f"{name}.txt").write_text("\f".join(texts(count, seed)), encoding="utf-8")
    data = recipes.to_dict(in_memory(**{"vocab_size": 320, "max_length": 48, **model}))

    def source(name):
        text = {"kind": "text", "files": [str(folder / f"{name}.txt")], "separator": "\f"}
        return [{"name": name, "source": text}]

    data |= {
        "tokenizer": {"kind": "train", "vocab_size": 320},
        "data": {
            "length": 24,
            "packing": {"kind": "cut"},
            "train": source("train"),
            "held_out": source("held_out"),
            "prepare": {"folder": str(folder / "prepared"), "workers": 1, "shards": 2},
        },
        "eval": {"every": 5, "batch_size": 8, "max_rows": 12},
        "checkpoint": {"every": 4},
        "run": {"name": "run", "folder": str(folder / "runs"), "compilation_cache": ""},
    }
    data["training"] |= {"steps": 10}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def replace(config: Config, **sections) -> Config:
    """The recipe with keys of sections changed: replace(config, run={"name": "other"})."""
    changed = {
        section: dataclasses.replace(getattr(config, section), **keys)
        for section, keys in sections.items()
    }
    return dataclasses.replace(config, **changed)
