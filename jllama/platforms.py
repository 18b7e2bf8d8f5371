"""JAX's plugins for accelerators: which are installed, and why JAX could not start one."""

import importlib.util
import os
import sys
import traceback
from pathlib import Path

from jllama.errors import install

_EXTRAS = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}  # platform: this package's extra
_REFUSED = "Unable to initialize backend "


def has_cuda() -> bool:
    """Whether JAX's plugin for NVIDIA GPUs is installed."""
    folders = [Path(path, "jax_plugins") for path in sys.path]
    return any((folder / f"xla_cuda{n}").is_dir() for folder in folders for n in (12, 13))


def has_tpu() -> bool:
    """Whether libtpu, JAX's plugin for TPUs, is installed or named by TPU_LIBRARY_PATH."""
    return (
        bool(os.environ.get("TPU_LIBRARY_PATH")) or importlib.util.find_spec("libtpu") is not None
    )


def explain(error: Exception) -> str | None:
    """A line about an error with which JAX starts no platform; None for any other error."""
    text = str(error)
    at = traceback.extract_tb(error.__traceback__)
    # JAX asserts that it has a platform: cuda alone is passed over where no GPU is visible.
    passed_over = isinstance(error, AssertionError) and at and "xla_bridge" in at[-1].filename
    if not (passed_over or (isinstance(error, RuntimeError) and text.startswith(_REFUSED))):
        return None
    asked = os.environ.get("JAX_PLATFORMS", "")
    names = asked.split(",")
    installed = {"cuda": has_cuda(), "tpu": has_tpu()}
    for name in names:
        extra = _EXTRAS.get(name)
        if extra and not installed[extra]:
            return (
                f"JAX_PLATFORMS={asked}: JAX's plugin for {name} is not installed;"
                f" {install(extra)}, or set JAX_PLATFORMS=cpu"
            )
    unknown = [name for name in names if name not in ("", "cpu", *_EXTRAS)]
    if unknown:
        return f"JAX_PLATFORMS={asked}: JAX has no platform {unknown[0]}; set cpu, cuda or tpu"
    reason = "no NVIDIA GPU is visible" if passed_over else " ".join(text.split())[:300]
    where = f"JAX_PLATFORMS={asked}" if asked else "JAX"
    return f"{where}: {reason}; JAX_PLATFORMS=cpu runs on the CPU"
