"""Training as a pure function, and the names with which to write a training loop of one's own.

`train(config)` runs a whole recipe. The other names are the parts that its loop is made of:
docs/library.md describes each, and examples/own_loop.py trains with them. Importing this package
imports nothing else; each name is imported when it is asked for.
"""

import importlib
from typing import Any

# name: (module, its name there)
_HOME = {
    "Batches": ("jllama.train.batches", "Batches"),
    "Checkpoints": ("jllama.store.checkpoint", "Checkpoints"),
    "Result": ("jllama.train.report", "Result"),
    "StateDef": ("jllama.train.state", "StateDef"),
    "TrainState": ("jllama.train.state", "TrainState"),
    "causal_lm_logits": ("jllama.train.loss", "causal_lm_logits"),
    "causal_lm_loss": ("jllama.train.loss", "causal_lm_loss"),
    "define_state": ("jllama.train.state", "define_state"),
    "evaluate": ("jllama.train.held_out", "evaluate"),
    "init_state": ("jllama.train.state", "init_state"),
    "load_recipe": ("jllama.train.recipe", "load_recipe"),
    "load_state": ("jllama.train.state", "load_state"),
    "make_eval_step": ("jllama.train.step", "make_eval_step"),
    "make_placement": ("jllama.train.placement", "make_placement"),
    "make_train_step": ("jllama.train.step", "make_train_step"),
    "open_branch": ("jllama.train.branch", "open_branch"),
    "open_initial": ("jllama.train.initial", "open_initial"),
    "open_run": ("jllama.train.folder", "open_run"),
    "start_processes": ("jllama.parallel.distributed", "start"),
    "start_state": ("jllama.train.start", "start_state"),
    "to_trees": ("jllama.train.state", "to_trees"),
    "train": ("jllama.train.loop", "train"),
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jllama.train' has no attribute {name!r}")
    module, name_there = _HOME[name]
    return getattr(importlib.import_module(module), name_there)


def __dir__() -> list[str]:
    return __all__
