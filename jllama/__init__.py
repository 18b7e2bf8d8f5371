"""The LLaMA family in JAX and Flax.

`jllama.load(path)` opens a trained model, a `Llama`: see `jllama.generate`. Importing the package
alone does not import JAX, so processes that only tokenise text start fast.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Infill": "jllama.text.infill",
    "Llama": "jllama.generate.llama",
    "load": "jllama.generate.load",
    "load_tokenizer": "jllama.text.tokenizer",
    "UserError": "jllama.errors",
}
__all__ = ["Infill", "Llama", "UserError", "__version__", "load", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jllama' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
