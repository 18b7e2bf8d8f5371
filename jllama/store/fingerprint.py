"""One digest of a state's bits, the same whatever its sharding.

Each leaf gives two sums, modulo 2**32, of an integer mix of (global index, bits) over its elements.
The sums are order-free, so each device adds up its own part under jit and no host gathers a leaf.
"""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jllama.model.param import dotted

_SALTS = (0x9E3779B9, 0x85EBCA6B)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every input bit changes half of the output bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _bits(x: jax.Array) -> list[jax.Array]:
    """The elements' bits as uint32 arrays of x's shape."""
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    width = x.dtype.itemsize * 8
    if width <= 32:
        return [lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)]
    halves = lax.bitcast_convert_type(x, jnp.uint32)
    return [halves[..., 0], halves[..., 1]]


@functools.partial(jax.jit, static_argnums=1)
def _leaf_sums(x: jax.Array, dtype: Any) -> jax.Array:
    """[2] uint32."""
    x = x.astype(dtype)
    sums = []
    for salt in _SALTS:
        h = jnp.full(x.shape, salt, jnp.uint32)
        # The index goes in coordinate by coordinate: a linear one overflows in large leaves.
        for axis in range(x.ndim):
            h = _mix(h ^ lax.broadcasted_iota(jnp.uint32, x.shape, axis))
        for bits in _bits(x):
            h = _mix(h ^ bits)
        sums.append(jnp.sum(h, dtype=jnp.uint32))
    return jnp.stack(sums)


class Fingerprint:
    """`fingerprint` of a tree that is given leaf by leaf, in any order."""

    def __init__(self, dtype: Any = None):
        self._dtype, self._leaves = dtype, []

    def add(self, path: str, x: jax.Array) -> None:
        """Adds a leaf at its dotted path, of which only two sums are kept."""
        dtype = self._dtype or x.dtype
        # One at a time: many programs of several devices at once may deadlock on CPUs.
        sums = jax.block_until_ready(_leaf_sums(x, dtype))
        self._leaves.append((f"{path} {tuple(x.shape)} {dtype}", sums))

    def __str__(self) -> str:
        """The digest."""
        sums = jax.device_get([s for _, s in self._leaves])
        lines = [f"{name} {s.tolist()}" for (name, _), s in zip(self._leaves, sums, strict=True)]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def fingerprint(tree: Any, dtype: Any = None) -> str:
    """SHA-256, in hex, over the sorted leaves' paths, shapes, dtypes and sums.

    With a `dtype` the leaves are cast to it first. In bfloat16 a model has one fingerprint,
    whichever dtype its parameters are read in.
    """
    digest = Fingerprint(dtype)
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        digest.add(dotted(path), x)
    return str(digest)
