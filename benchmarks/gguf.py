"""Measures size and perplexity of each kind of GGUF file, with llama.cpp on held-out text.

    python -m benchmarks.gguf RUN --peer PYTHON

RUN is a run of configs/train/tiny.yaml, PYTHON an interpreter with llama-cpp-python. The text is
the recipe's own held-out part of Python's standard library, in rows of one BOS and 255 tokens.
"""

import argparse
import itertools
import json
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np

import jllama
from jllama.config import StdlibSource
from jllama.data.source import documents
from jllama.flops import parameter_count
from jllama.interop.gguf import KINDS, write_gguf

LENGTH = 256
ROOT = Path(__file__).parent.parent


def rows(tokenizer, count: int) -> np.ndarray:
    """Rows of held-out text: [count, LENGTH] ids."""
    source = StdlibSource(kind="stdlib", split="held_out")
    ids = itertools.chain.from_iterable(tokenizer.encode(d.text) for d in documents(source))
    text = np.fromiter(itertools.islice(ids, count * (LENGTH - 1)), np.int32)
    text = text.reshape(count, LENGTH - 1)
    return np.concatenate([np.full((count, 1), tokenizer.bos_id, np.int32), text], axis=1)


def own_score(model, ids: np.ndarray) -> float:
    """The sum of -log p over all predicted tokens, computed by jllama."""
    total = 0.0
    for batch in np.array_split(ids, max(1, len(ids) // 16)):
        x = np.asarray(model.logits(batch), np.float64)[:, :-1]
        chosen = np.take_along_axis(x, batch[:, 1:, None], axis=-1)[..., 0]
        total += float((np.logaddexp.reduce(x, axis=-1) - chosen).sum())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--peer", required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--rows", type=int, default=256)
    args = parser.parse_args()
    model = jllama.load(args.run, dtype="float32")
    ids = rows(model.tokenizer, args.rows)
    predicted = ids[:, 1:].size
    print(f"{args.rows} rows, {predicted:,} predicted tokens")
    ours = np.exp(own_score(model, ids) / predicted)
    print("| kind | bytes | bits per weight | perplexity | difference |\n|---|---|---|---|---|")
    print(f"| jllama, float32 | | | {ours:.4f} | |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = []
        for kind in KINDS:
            file = folder / f"{kind}.gguf"
            write_gguf(file, model.config, model.params, model.tokenizer, kind)
            job = {"do": "score", "model": str(file), "ids": ids.tolist()}
            jobs.append(job | {"out": str(folder / f"{kind}.json")})
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [args.peer, "-m", "tests.peers.scripts.llama", str(folder / "jobs.json")]
        subprocess.run(command, cwd=ROOT, check=True)
        exact = None
        for kind in KINDS:
            file = folder / f"{kind}.gguf"
            tensors = sum(int(t.n_bytes) for t in gguf.GGUFReader(file).tensors)
            score = json.loads((folder / f"{kind}.json").read_text())
            value = np.exp(score / predicted)
            exact = exact or value
            bits = tensors * 8 / parameter_count(model.config)
            size, loss = file.stat().st_size, value / exact - 1
            print(f"| {kind} | {size:,} | {bits:.2f} | {value:.4f} | {loss:+.2%} |")


if __name__ == "__main__":
    main()
