"""Compresses the held-out text with `xz -9`, as a yardstick for bits per byte."""

import lzma
from concurrent.futures import ThreadPoolExecutor

from jllama.config import DataConfig, SourceConfig
from jllama.data import source as sources


def xz_bits_per_byte(data: DataConfig) -> dict[str, float]:
    """Compressed bits of `xz -9` per byte of the held-out documents, concatenated in order.

    Returns:
      xz_bits_per_byte: for the held-out text compressed alone.
      xz_conditional_bits_per_byte: for the bits that it adds to the compressed training text, of
        which xz's dictionary holds the last 64 MiB.
    """
    train = b"".join(_text(s, data) for s in data.train)
    held_out = b"".join(_text(s, data) for s in data.held_out)
    with ThreadPoolExecutor() as pool:  # lzma releases the GIL
        alone, before, both = pool.map(_xz_size, (held_out, train, train + held_out))
    bits = 8 / len(held_out)
    return {
        "xz_bits_per_byte": alone * bits,
        "xz_conditional_bits_per_byte": (both - before) * bits,
    }


def _text(source: SourceConfig, data: DataConfig) -> bytes:
    documents = sources.documents(
        source.source, max_skipped=data.prepare.max_skipped, report=lambda line: None
    )
    return b"".join(d.text.encode() for d in documents)


def _xz_size(text: bytes) -> int:
    return len(lzma.compress(text, preset=9))
