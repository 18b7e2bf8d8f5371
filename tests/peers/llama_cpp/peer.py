"""llama.cpp through llama-cpp-python: runs in its virtual environment, and knows nothing of jllama.

Commands, with a model and a file of the request each; the answer goes to the third argument:

  logits    MODEL.gguf ids.npy out.npy      ids [T] -> logits [T,V] float32
  greedy    MODEL.gguf request.json out.json  {"ids": [...], "new": n} -> the n ids of largest logit
  tokenize  MODEL.gguf texts.json out.json  texts -> ids of each, without BOS
  decode    MODEL.gguf lists.json out.json  lists of ids -> the text of each, as hex
  score     MODEL.gguf ids.npy out.json     ids [B,T] -> the sum of -log p over ids[:, 1:]
  quantize  MODEL.gguf KIND.txt out.gguf    llama.cpp's own quantisation
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

F32 = 0  # of the keys and values, which llama.cpp keeps in float16 unless told


def load(path: str, length: int) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        path,
        n_ctx=length,
        logits_all=True,
        n_threads=2,
        n_threads_batch=2,
        type_k=F32,
        type_v=F32,
        verbose=False,
    )


def logits(model: str, request: str, answer: str) -> None:
    ids = np.load(request)
    llama = load(model, len(ids))
    llama.eval(ids.tolist())
    np.save(answer, llama.scores[: len(ids)])


def greedy(model: str, request: str, answer: str) -> None:
    asked = json.loads(Path(request).read_text())
    ids = list(asked["ids"])
    llama = load(model, len(ids) + asked["new"])
    llama.eval(ids)
    new = []
    for _ in range(asked["new"]):
        new.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(new[-1:])
    Path(answer).write_text(json.dumps(new))


def vocabulary(model: str) -> llama_cpp.Llama:
    return llama_cpp.Llama(model, vocab_only=True, verbose=False)


def tokenize(model: str, request: str, answer: str) -> None:
    llama = vocabulary(model)
    texts = json.loads(Path(request).read_text())
    ids = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    Path(answer).write_text(json.dumps(ids))


def decode(model: str, request: str, answer: str) -> None:
    llama = vocabulary(model)
    lists = json.loads(Path(request).read_text())
    Path(answer).write_text(json.dumps([llama.detokenize(ids).hex() for ids in lists]))


def score(model: str, request: str, answer: str) -> None:
    rows = np.load(request)
    llama = load(model, rows.shape[1])
    total = 0.0
    for row in rows:
        llama.reset()
        llama.eval(row.tolist())
        x = llama.scores[: len(row) - 1].astype(np.float64)
        x -= x.max(-1, keepdims=True)
        logp = x[np.arange(len(row) - 1), row[1:]] - np.log(np.exp(x).sum(-1))
        total -= float(logp.sum())
    Path(answer).write_text(json.dumps(total))


def quantize(model: str, request: str, answer: str) -> None:
    kind = Path(request).read_text().strip()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    failed = llama_cpp.llama_model_quantize(model.encode(), answer.encode(), params)
    assert not failed, f"llama.cpp cannot make {kind}"


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
