"""The code of a tokenising process. It imports little, because such processes start often."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from jllama.text.tokenizer import Tokenizer

# What is known of a document: its tokens, the UTF-8 bytes of its text, and the text's hash.
DOCUMENT = np.dtype([("tokens", "<u8"), ("bytes", "<u8"), ("hash", "<u8")])

_tokenizer: Tokenizer


def start_worker(tokenizer: Tokenizer) -> None:
    """Prepares this process to tokenise.

    It ignores Ctrl-C, which its parent handles, and it ends when its parent dies.
    """
    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_in_worker(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Calls `encode_texts` with the tokenizer that this process was started with."""
    return encode_texts(_tokenizer, texts)


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens of all texts, joined; `DOCUMENT` of each text).

    Each text's tokens end with EOS, and begin with BOS if the tokenizer adds it.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    bos = tokenizer.adds_bos
    ids = [np.array(tokenizer.encode(text, bos=bos, eos=True), dtype) for text in texts]
    documents = [
        (len(i), len(text.encode()), text_hash(text)) for i, text in zip(ids, texts, strict=True)
    ]
    return np.concatenate(ids), np.array(documents, DOCUMENT)


def by_document(tokens: np.ndarray, documents: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the tokens of each document, from what `encode_texts` returns."""
    at = 0
    for n in documents["tokens"].tolist():
        yield tokens[at : at + n]
        at += n


def text_hash(text: str) -> int:
    """Returns a number below 2^64 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_held_out(number: Any, one_in: int) -> Any:
    """Whether texts with these hashes, a number or an array, are held out."""
    return number % one_in == 0


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smaller of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
