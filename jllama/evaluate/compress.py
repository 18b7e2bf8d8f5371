"""Compresses the held-out text with `xz -9`, as a yardstick for bits per byte."""

import lzma
from concurrent.futures import ThreadPoolExecutor

from jllama.config import DataConfig
from jllama.data.split import Side, sources_of, texts_of


def xz_bits_per_byte(data: DataConfig) -> dict[str, float]:
    """Compressed bits of `xz -9` per byte of the held-out documents, concatenated in order.

    Returns:
      xz_bits_per_byte: for the held-out text compressed alone.
      xz_conditional_bits_per_byte: for the bits that it adds to the compressed training text, of
        which xz's dictionary holds the last 64 MiB.
    """
    train, held_out = _text(data, "train"), _text(data, "held_out")
    with ThreadPoolExecutor() as pool:  # lzma releases the GIL
        alone, before, both = pool.map(_xz_size, (held_out, train, train + held_out))
    bits = 8 / len(held_out)
    return {
        "xz_bits_per_byte": alone * bits,
        "xz_conditional_bits_per_byte": (both - before) * bits,
    }


def _text(data: DataConfig, side: Side) -> bytes:
    return b"".join(
        text.encode()
        for source in sources_of(data, side)
        for text in texts_of(data, side, source, report=lambda line: None)
    )


def _xz_size(text: bytes) -> int:
    return len(lzma.compress(text, preset=9))
