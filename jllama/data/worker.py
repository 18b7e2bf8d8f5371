"""What a tokenising process runs. It imports no more than it needs: such a process starts often."""

import multiprocessing
import os
import signal
import threading

import numpy as np

from jllama.text.tokenizer import Tokenizer

_tokenizer: Tokenizer


def start(tokenizer: Tokenizer) -> None:
    """Readies this process: Ctrl-C is the parent's to handle, and its death ends this one too."""
    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_here(texts: list[str]) -> tuple[np.ndarray, list[int], int]:
    """`encode` with the tokenizer that this process was started with."""
    return encode(_tokenizer, texts)


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, list[int], int]:
    """(tokens of all texts joined, each in BOS and EOS; tokens per text; UTF-8 bytes)."""
    dtype = token_dtype(tokenizer.vocab_size)
    ids = [np.array(tokenizer.encode(text, bos=True, eos=True), dtype) for text in texts]
    return np.concatenate(ids), [len(i) for i in ids], sum(len(t.encode()) for t in texts)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
