"""llama.cpp on a GGUF file, through llama-cpp-python.

    python -m tests.peers.scripts.llama JOBS.json

Each job of the JSON list has a `model`, an `out` and what to `do`:

  logits    of `ids` [T]: float32 [T,V], an .npy file
  greedy    the `new` ids of largest logit after `ids`
  score     of `ids` [B,T]: the sum of -log p of each row's ids but the first
  tokenize  the file `texts`, a list: ids of each, without BOS
  decode    the file `ids`, lists of ids: the UTF-8 of each in hex
  quantize  by llama.cpp itself to `kind`
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

_F32 = 0  # of keys and values, which llama.cpp keeps in float16 unless told


def load(model: str, length: int) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        model,
        n_ctx=length,
        logits_all=True,
        n_threads=2,
        n_threads_batch=2,
        type_k=_F32,
        type_v=_F32,
        verbose=False,
    )


def logits(model: str, ids: list[int]) -> np.ndarray:
    llama = load(model, len(ids))
    llama.eval(ids)
    return llama.scores[: len(ids)]


def greedy(model: str, ids: list[int], new: int) -> list[int]:
    llama = load(model, len(ids) + new)
    out = []
    for _ in range(new):
        llama.eval(out[-1:] or ids)
        out.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
    return out


def score(model: str, ids: list[list[int]]) -> float:
    llama = load(model, len(ids[0]))
    total = 0.0
    for row in ids:
        llama.reset()
        llama.eval(row)
        x = llama.scores[: len(row) - 1].astype(np.float64)
        x -= x.max(-1, keepdims=True)
        chosen = x[np.arange(len(row) - 1), row[1:]]
        total -= float((chosen - np.log(np.exp(x).sum(-1))).sum())
    return total


def tokenize(model: str, texts: str) -> list[list[int]]:
    llama = llama_cpp.Llama(model, vocab_only=True, verbose=False)
    wanted = json.loads(Path(texts).read_text())
    return [llama.tokenize(text.encode(), add_bos=False, special=False) for text in wanted]


def decode(model: str, ids: str) -> list[str]:
    llama = llama_cpp.Llama(model, vocab_only=True, verbose=False)
    return [llama.detokenize(some).hex() for some in json.loads(Path(ids).read_text())]


def quantize(model: str, out: str, kind: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = 2
    if llama_cpp.llama_model_quantize(model.encode(), out.encode(), params):
        raise SystemExit(f"llama.cpp cannot make {kind} of {model}")


_DO = {f.__name__: f for f in (logits, greedy, score, tokenize, decode)}


def main(jobs: list[dict]) -> None:
    for job in jobs:
        do, out = job.pop("do"), job.pop("out")
        if do == "quantize":
            quantize(out=out, **job)
            continue
        result = _DO[do](**job)
        if isinstance(result, np.ndarray):
            np.save(out, result)
        else:
            Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
