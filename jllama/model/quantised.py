"""Reads a quantised matrix, a `qwix.QArray`, as an array."""

from typing import Any

import jax
import jax.numpy as jnp

# NormalFloat of 4 bits (QLoRA, arXiv:2305.14314, appendix E), by code.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def is_quantised(kernel: Any) -> bool:
    """Whether a matrix is a `qwix.QArray`, by its fields: qwix takes half a second to import."""
    return hasattr(kernel, "qvalue")


def dequantised(kernel: Any) -> jax.Array:
    """A matrix without zero points, in the dtype of its scales: `qwix.dequantize`, bit for bit.

    That function looks NF4 up in a table, with flat indices. The compiler for TPUs makes selects of
    that too, but writes each level to memory.
    """
    values = _nf4(kernel.qvalue) if kernel.qtype == "nf4" else kernel.qvalue
    scale = kernel.scale
    # A scale belongs to a block of neighbours along each dimension.
    sizes = zip(scale.shape, values.shape, strict=True)
    blocks = [n for scales, size in sizes for n in (scales, size // scales)]
    scale = jnp.expand_dims(scale, range(1, 2 * scale.ndim, 2))
    return (values.astype(scale.dtype).reshape(blocks) * scale).reshape(values.shape)


def _nf4(codes: jax.Array) -> jax.Array:
    """The float32 values of 4-bit codes: a tree of selects, with one level for each bit."""
    bits = codes.astype(jnp.int32)
    values = [jnp.float32(value) for value in _NF4]
    for bit in range(4):
        is_set = (bits >> bit) & 1 == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, high, low) for low, high in pairs]
    return values[0]
