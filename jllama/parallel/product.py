"""Matrix products and table lookups of sharded arrays.

Where each device needs only its shard of a sum over devices, XLA's partitioner may emit an
all-reduce and a slice, which is twice the traffic. This module emits the reduce-scatter itself. Of
one over a square or a cube of chips the TPU's compiler makes an all-reduce of the whole array too;
so this module can emit one for each dimension of the torus that the devices span.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jllama.parallel.mesh import scatter_stages
from jllama.parallel.sharding import Parts, active_placement, pin


def contract(
    pairs: Sequence[tuple[jax.Array, jax.Array]],
    dims: tuple[tuple[int, ...], tuple[int, ...]],
    parts: tuple[Parts, Parts],
    target: Parts,
    gradient_dtype: Any = None,
) -> jax.Array:
    """Returns the sum of `lax.dot_general(a, b)` over all pairs (a, b), sharded by `target`.

    Args:
      pairs: arrays (a, b) whose products have the same shape.
      dims: the contracted dimensions of a, and those of b.
      parts: the mesh axes over which the dimensions of a and of b are sharded; contracted
        dimensions are sharded alike.
      target: the mesh axes over which the dimensions of the result are sharded.
      gradient_dtype: the dtype of the parameter whose gradient this is. A device forms its sums in
        it, and sends them as `reduce` says. None means an activation, in the dtype of the arrays.
    """

    def local(*pairs):
        products = (
            lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=gradient_dtype)
            for a, b in pairs
        )
        return functools.reduce(operator.add, products)

    summed = tuple(axis for d in dims[0] for axis in parts[0][d])
    if not summed:
        return pin(local(*pairs), target)
    free = [
        axes for contracted, array in zip(dims, parts, strict=True)
        for d, axes in enumerate(array) if d not in contracted
    ]  # fmt: skip
    scatter = [_scatter_axes(have, want, summed) for have, want in zip(free, target, strict=True)]
    reached = [have + more for have, more in zip(free, scatter, strict=True)]
    placement = active_placement()
    specs = tuple(placement.partition(*array) for array in parts)
    run = placement.per_device(
        lambda *pairs: reduce(local(*pairs), summed, scatter, gradient_dtype is not None),
        (specs,) * len(pairs),
        placement.partition(*reached),
    )
    return pin(run(*pairs), target)


def _scatter_axes(
    have: tuple[str, ...], want: tuple[str, ...], summed: tuple[str, ...]
) -> tuple[str, ...]:
    """The axes over which to scatter a sum over `summed`, for a dimension sharded over `have`.

    They extend `have` to `want`; there are none if `want` does not begin with `have`, or needs an
    axis that is not summed.
    """
    more = want[len(have) :]
    return more if want[: len(have)] == have and set(more) <= set(summed) else ()


def all_gather(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """Gathers the shards of x along `dimension` over the mesh axes `axes`, inside `per_device`."""
    return lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x


def reduce(
    x: jax.Array,
    axes: tuple[str, ...],
    scatter: Sequence[tuple[str, ...]],
    is_gradient: bool = False,
) -> jax.Array:
    """Sums x over the mesh axes `axes`, inside `per_device`, and scatters the sum.

    Each dimension d is scattered over the axes `scatter[d]`, a subset of `axes`. The scatters come
    first, so that less is sent along the other axes. The gradient of a parameter is sent, and added
    on its way, in the placement's `gradient_dtype`; the result has the dtype of x.
    """
    dtype = x.dtype
    if is_gradient:
        x = as_sent(x)
    for dimension, part in enumerate(scatter):
        if part:
            x = _scatter(x, part, dimension)
    scattered = {axis for part in scatter for axis in part}
    rest = tuple(axis for axis in axes if axis not in scattered)
    return (lax.psum(x, rest) if rest else x).astype(dtype)


def as_sent(gradient: jax.Array) -> jax.Array:
    """A parameter's gradient in the dtype in which devices send it."""
    placement = active_placement()
    narrow = placement.gradient_dtype == "bfloat16" and gradient.dtype == jnp.float32
    return gradient.astype(jnp.bfloat16) if narrow else gradient


def _scatter(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    before, after = x.shape[:dimension], x.shape[dimension + 1 :]
    placement = active_placement()
    stages = scatter_stages(placement.mesh, axes)
    # Over one dimension of the torus a leading dimension must be untiled, see below. Over several,
    # in one collective, the tiled form costs no copies.
    tiled = not placement.scatter_in_stages if len(stages) > 1 else math.prod(before) > 1
    if tiled:
        return lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)
    if math.prod(before) > 1 and math.prod(after) > 1:
        x = _scatter(jnp.moveaxis(x, dimension, 0), axes, 0)
        return jnp.moveaxis(x, 0, dimension)
    # Untiled and of three dimensions, [n,size,A] or [B,n,size]: for a leading dimension, and in
    # stages, the TPU's compiler turns other forms into an all-reduce and a slice.
    size, ways = x.shape[dimension], math.prod(stages)
    devices = np.arange(ways).reshape(stages)
    for stage, n in enumerate(stages):
        groups = None if n == ways else np.moveaxis(devices, stage, -1).reshape(-1, n).tolist()
        size //= n
        if math.prod(before) > 1:
            blocks, part = x.reshape(-1, n, size), 1
        else:
            blocks, part = x.reshape(n, size, -1), 0
        x = lax.psum_scatter(blocks, axes, scatter_dimension=part, axis_index_groups=groups)
    return x.reshape(*before, size, *after)


def take_rows(table: jax.Array, tokens: jax.Array, axes: tuple[str, str], dtype: Any) -> jax.Array:
    """`table[tokens]` in `dtype`: table [V,D] with logical `axes`, tokens [B,T] -> [B,T,D].

    B rows of tokens, T positions, V vocabulary, D width.

    On a mesh every device looks up its shard of the width, for the tokens of all devices that hold
    the other shards. So tokens are gathered (four bytes each), and an all-to-all sends the result
    back to the devices of its rows. No device ever holds the whole table or its whole gradient.
    """
    placement = active_placement()
    if placement is None:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    vocab, width = placement.mesh_axes(table.shape, axes, "embedding")
    batch, seq = placement.mesh_axes(tokens.shape, ("batch", "seq"), "tokens")

    def without(*taken):
        return (tuple(a for a in axes if a not in taken) for axes in (batch, seq))

    tokens = placement.pin(tokens, *without(*vocab, *width))
    x = jnp.take(table, tokens, axis=0).astype(dtype)
    x = placement.pin(x, *without(*vocab, *width), width)
    # One mesh axis after the other, the innermost first: for all at once the partitioner would
    # gather the whole result, and in another order it would first move blocks between devices.
    while width:
        width = width[:-1]
        x = placement.pin(x, *without(*vocab, *width), width)
    return placement.pin(x, batch, seq, ())
