"""Opening a model imports what its format needs, and nothing of training."""

import subprocess
import sys
from pathlib import Path

import tiny

from jllama.config import TrainedTokenizer
from jllama.interop import hf
from jllama.text.vocabulary import train_sentencepiece

ROOT = Path(__file__).parents[2]
TRAINING = ("grain", "tensorflow_datasets", "optax", "tensorboardX", "pyarrow")
CHECKPOINTS = ("orbax", "qwix")
SAMPLE = "runpy.run_path(sys.argv[0], run_name='__main__')"
PROGRAM = """
import runpy, sys
names, sys.argv = sys.argv[1].split(), sys.argv[2:]
try:
    {body}
finally:
    print("imported:", *(name for name in names if name in sys.modules), file=sys.stderr)
"""


def imported(body, *args):
    """Which of the packages a program imports."""
    names = " ".join(["jax", *TRAINING, *CHECKPOINTS])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body), names, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1].removeprefix("imported:").split()


def test_the_door_imports_nothing_of_training():
    assert imported("import jllama; jllama.load") == ["jax"]


def test_sample_imports_nothing_of_training_nor_of_checkpoints(tmp_path):
    tokenizer = train_sentencepiece(
        [Path(__file__).read_text()], TrainedTokenizer(kind="train", vocab_size=300)
    )
    model = tiny.config(vocab_size=320)
    hf.write_folder(tmp_path / "hf", model, tiny.params(model), tokenizer)
    args = ("sample.py", "--model", tmp_path / "hf", "--max-new-tokens", 1)
    assert imported(SAMPLE, *args) == ["jax"]
