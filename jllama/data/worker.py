"""The code of a tokenising process. It imports little, because such processes start often."""

import multiprocessing
import os
import signal
import threading

import numpy as np

from jllama.text.tokenizer import Tokenizer

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


def encode_in_worker(texts: list[str]) -> tuple[np.ndarray, list[int], int]:
    """Calls `encode_texts` with the tokenizer that this process was started with."""
    return encode_texts(_tokenizer, texts)


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, list[int], int]:
    """Returns (tokens of all texts, joined; number of tokens of each; UTF-8 bytes of all).

    Each text's tokens end with EOS, and begin with BOS if the tokenizer adds it.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    ids = [
        np.array(tokenizer.encode(text, bos=tokenizer.adds_bos, eos=True), dtype) for text in texts
    ]
    return np.concatenate(ids), [len(i) for i in ids], sum(len(t.encode()) for t in texts)


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smaller of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
