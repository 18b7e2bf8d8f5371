"""Runs one compilation in a process of its own, with the environment that the compiler needs."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jllama
from jllama.config import Config
from jllama.config import recipe as recipes
from jllama.errors import UserError, install
from jllama.plan.topology import Topology
from jllama.platforms import has_cuda

_PROGRAM = "jllama.plan.step"

# libtpu looks for the description of a TPU machine, and for other processes that use the TPU. Here
# is no such machine, and the compiler uses no TPU.
_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}
_ALWAYS = {
    # Attached accelerators are not used: all computations run on the CPU.
    "JAX_PLATFORMS": "cpu",
    # A step from the cache would have no compile time.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# Flags for this process's platform, because another compiler aborts at flags that it does not know;
# and debugging options with which JAX compiles no step, or one that donates nothing.
_NEVER = ("XLA_FLAGS", "JAX_DISABLE_JIT", "JAX_DEBUG_NANS", "JAX_DEBUG_INFS")
_GPU = {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}  # autotuning would need a device


class CompileFailed(Exception):
    """The compiler failed for another reason than too little memory; its message is one line."""


def find_libtpu() -> str:
    """The path of libtpu: TPU_LIBRARY_PATH, else installed by `make plan`, else by the package."""
    path = os.environ.get("TPU_LIBRARY_PATH")
    if path:
        if not Path(path).is_file():
            raise UserError(f"TPU_LIBRARY_PATH={path}: no such file")
        return path
    beside = Path(sys.prefix, "libtpu", "libtpu", "libtpu.so")
    if beside.is_file():
        return str(beside)
    spec = importlib.util.find_spec("libtpu")
    if spec is None or not spec.origin:
        raise UserError(
            f"planning needs the TPU compiler libtpu, but no TPU: `make plan`, or {install('plan')}"
        )
    return str(Path(spec.origin).parent / "libtpu.so")


def check_cuda() -> None:
    """Raises `UserError` when JAX's CUDA compiler is not installed."""
    if not has_cuda():
        raise UserError(
            f"planning for a GPU needs JAX's CUDA compiler, but no GPU: {install('cuda')}"
        )


def environment(topology: Topology) -> dict[str, str]:
    """The environment of the compiling process: this process's, with the changes above."""
    package = str(Path(jllama.__file__).parent.parent)
    paths = [package, os.environ.get("PYTHONPATH", "")]
    env = os.environ | _ALWAYS | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    for name in _NEVER:
        env.pop(name, None)
    if topology.on_gpu:
        check_cuda()
        return env | _GPU
    return env | _TPU | {"TPU_LIBRARY_PATH": find_libtpu()}


def compile_step(config: Config, topology: Topology, where: str = "recipe") -> dict[str, Any]:
    """The report of `jllama.plan.step` on a recipe.

    Raises `UserError` if the recipe cannot be placed on these devices, and `CompileFailed`.
    """
    question = {
        "config": recipes.to_dict(config),
        "where": where,
        "topology": topology.name,
        "slices": topology.slices,
    }
    ended = subprocess.run(  # on Ctrl-C it kills the compiler
        [sys.executable, "-m", _PROGRAM],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(topology),
    )
    return _answer(ended.returncode, ended.stdout, ended.stderr)


def _answer(status: int, out: str, err: str) -> dict[str, Any]:
    try:
        answer = json.loads(out)
    except ValueError:
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        raise CompileFailed(f"the compiler's process {how}: {first_line(err)}") from None
    if "user_error" in answer:
        raise UserError(answer["user_error"])
    if "failure" in answer:
        raise CompileFailed(first_line(answer["failure"]))
    return answer


def first_line(text: str) -> str:
    """The line of a compiler's message that names the error: the first that is not noise."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    noise = re.compile(r"^(WARNING|W\d{4}|I\d{4}|Traceback|File |@ |\*\*\*|=+|#\d+|\s*$)")
    lines = [line for line in lines if not noise.match(line)] or ["it printed nothing"]
    # The last line of a Python traceback names the error.
    return lines[-1 if "Traceback" in text else 0][:500]
