"""Measures host memory and time of importing and exporting a model of random weights.

    python -m benchmarks.convert --model tinyllama-1.1b

Each row is a process of its own. Its figure is the peak resident memory of the work, less the
memory before it (Python, JAX and its devices), divided by the bytes of the parameters.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

import jllama
from jllama import flops
from jllama.cli import main as jllama_command
from jllama.config import ComputeConfig
from jllama.config import recipe as recipes
from jllama.interop.hf import write_folder
from jllama.model import llama

_HALF = ["--to", "hf", "--dtype", "float16"]
# The measurements in their order, with their arguments; {} is the work folder.
ROWS = {
    "jllama.load of a Hugging Face folder": ["load", "{}/hf"],
    "jllama convert, Hugging Face to jllama": ["convert", "{}/hf", "{}/own"],
    "jllama convert, Hugging Face to float16": ["convert", "{}/hf", "{}/half", *_HALF],
    "jllama.load of a jllama folder": ["load", "{}/own"],
    "jllama convert, jllama to Hugging Face": ["convert", "{}/own", "{}/hf2"],
}


def make(folder: str, name: str) -> None:
    """Writes a Hugging Face folder with random bfloat16 parameters of a shipped model."""
    compute = ComputeConfig(dtype="bfloat16", param_dtype="bfloat16")
    model = recipes.load_model(name)
    init = jax.jit(llama.init_params, static_argnums=(0, 1))
    write_folder(Path(folder), model, init(model, compute, jax.random.key(0)), None)


def resident(key: str) -> int:
    """Bytes of resident memory: `key` is VmRSS for now, or VmHWM for the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(words: list[str]) -> None:
    """Does the work of one row and prints its figures."""
    jax.block_until_ready(jax.numpy.zeros(1))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, start = resident("VmRSS"), time.perf_counter()
    if words[0] == "load":
        jax.block_until_ready(jllama.load(words[1]).params)
    elif jllama_command(words):
        raise SystemExit("convert failed")
    seconds = time.perf_counter() - start
    print(json.dumps({"bytes": resident("VmHWM") - before, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tinyllama-1.1b", help="[%(default)s]")
    parser.add_argument("--folder", help="for the files, which are removed [a temporary one]")
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure)
    if args.make:
        return make(args.make, args.model)

    def child(*words: str) -> str:
        command = [sys.executable, "-m", "benchmarks.convert", "--model", args.model, *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.splitlines()[-1] if done.stdout else ""

    size = 2 * flops.parameter_count(recipes.load_model(args.model))
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        child("--make", f"{work}/hf")
        print(f"{args.model}, bfloat16: {size / 1e9:.2f} GB of parameters")
        for title, words in ROWS.items():
            figures = json.loads(child("--measure", *(word.format(work) for word in words)))
            ratio, rate = figures["bytes"] / size, size / 1e6 / figures["seconds"]
            print(f"{title:42} {ratio:5.2f} x  {figures['seconds']:6.1f} s  {rate:6.0f} MB/s")


if __name__ == "__main__":
    main()
