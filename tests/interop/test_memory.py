"""Reading a model takes little more of the host's memory than its parameters."""

import json
import os
import subprocess
import sys

import jax
import tiny

from jllama.flops import parameter_count
from jllama.interop.hf_config import write_config
from jllama.interop.names import NAMES, file_shape
from jllama.model import llama
from jllama.model.param import dotted

# A third of TinyLlama, in bfloat16: a gigabyte.
MODEL = tiny.config(
    vocab_size=32000, hidden_dim=2048, num_layers=8, num_heads=32, num_kv_heads=4, head_dim=64,
    ffn_dim=5632,
)  # fmt: skip
# Compiled programs and the like, whatever the model.
OWN = 100_000_000
LOAD = """
import sys; from pathlib import Path
import jax, jllama
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
jax.block_until_ready(jax.numpy.zeros(1))
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
jax.block_until_ready(jllama.load(sys.argv[1]).params)
print(resident("VmHWM") - before)
"""


def _zeros(folder):
    """A folder of the model whose weights are a hole in the file: read, they are zeros."""
    header, at = {}, 0
    leaves = jax.tree.leaves_with_path(llama.param_specs(MODEL, tiny.compute()))
    specs = {dotted(path): leaf for path, leaf in leaves}
    for name in NAMES:
        spec = specs[name.path]
        layers, shape = (spec.shape[0], spec.shape[1:]) if name.stacked else (1, spec.shape)
        for layer in range(layers):
            want = file_shape(shape, spec.inputs)
            end = at + 2 * want[0] * (want[1] if len(want) > 1 else 1)
            entry = {"dtype": "BF16", "shape": want, "data_offsets": [at, end]}
            header[name.of("hf", layer)], at = entry, end
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(write_config(MODEL, "bfloat16", None)))


def test_reading_peaks_below_1_3_times_the_parameters(tmp_path):
    _zeros(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 1.3 * 2 * parameter_count(MODEL) + OWN
