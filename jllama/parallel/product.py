"""Matrix products, and rows of a table, of arrays that are spread over devices.

Left to the partitioner, a sum over devices of which each keeps a part may be made whole first and
cut afterwards: twice the traffic. Here the sum lands where it belongs.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jllama.parallel.sharding import Parts, active_placement, pin


def contract(
    pairs: Sequence[tuple[jax.Array, jax.Array]],
    dims: tuple[tuple[int, ...], tuple[int, ...]],
    parts: tuple[Parts, Parts],
    target: Parts,
    dtype: Any = None,
) -> jax.Array:
    """The sum over pairs of `a . b`, contracted over `dims` as `lax.dot_general` does it.

    Args:
      pairs: arrays whose products have one shape.
      dims: the contracted dimensions of each a, and those of each b.
      parts: the mesh axes that share out the dimensions of each a and of each b, alike where they
        are contracted.
      target: those of the result.
      dtype: of the result and of all sums; None is that of the arrays.
    """

    def local(*pairs):
        products = (
            lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=dtype) for a, b in pairs
        )
        return functools.reduce(operator.add, products)

    summed = tuple(axis for d in dims[0] for axis in parts[0][d])
    if not summed:
        return pin(local(*pairs), target)
    free = [
        axes for own, array in zip(dims, parts, strict=True)
        for d, axes in enumerate(array) if d not in own
    ]  # fmt: skip
    scatter = [_further(have, want, summed) for have, want in zip(free, target, strict=True)]
    reached = [have + more for have, more in zip(free, scatter, strict=True)]
    placement = active_placement()
    specs = tuple(placement.partition(*array) for array in parts)
    run = placement.per_device(
        lambda *pairs: reduce(local(*pairs), summed, scatter),
        (specs,) * len(pairs),
        placement.partition(*reached),
    )
    return pin(run(*pairs), target)


def _further(
    have: tuple[str, ...], want: tuple[str, ...], summed: tuple[str, ...]
) -> tuple[str, ...]:
    """Axes over which a sum over `summed` can be scattered to get from `have` towards `want`."""
    more = want[len(have) :]
    return more if want[: len(have)] == have and set(more) <= set(summed) else ()


def all_gather(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """Inside `per_device`: x with `dimension` whole, of which devices along `axes` have parts."""
    return lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x


def reduce(x: jax.Array, axes: tuple[str, ...], scatter: Sequence[tuple[str, ...]]) -> jax.Array:
    """Inside `per_device`: the sum of x over `axes`.

    Of dimension d each device keeps its part over `scatter[d]`, axes that are among `axes`; these
    go first, so that what crosses the others is small.
    """
    for dimension, part in enumerate(scatter):
        if part:
            x = _scatter(x, part, dimension)
    kept = {axis for part in scatter for axis in part}
    rest = tuple(axis for axis in axes if axis not in kept)
    return lax.psum(x, rest) if rest else x


def _scatter(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    before, after = x.shape[:dimension], x.shape[dimension + 1 :]
    if math.prod(before) > 1:
        return lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)
    # The same, in blocks: where nothing stands before them, the TPU's compiler makes an all-reduce
    # and a slice of a tiled one.
    ways = lax.axis_size(axes)
    blocks = x.reshape(ways, x.shape[dimension] // ways, -1)
    return lax.psum_scatter(blocks, axes, scatter_dimension=0).reshape(*before, -1, *after)


def take_rows(table: jax.Array, tokens: jax.Array, axes: tuple[str, str], dtype: Any) -> jax.Array:
    """`table[tokens]` in `dtype`: table [V,D] of logical `axes`, tokens [B,T] -> [B,T,D].

    B rows of tokens, T positions, V vocabulary, D width.

    On a mesh every device reads its own part of the width, for all tokens of the devices that have
    the other parts. So tokens are gathered (four bytes each), the result goes back to its rows by
    an all-to-all, and no device ever holds the whole table or its whole gradient: both are read and
    summed where they are stored.
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
    # One mesh axis after the other, the innermost first: at once, the partitioner would gather the
    # whole result, and in another order it would move blocks between devices first.
    while width:
        width = width[:-1]
        x = placement.pin(x, *without(*vocab, *width), width)
    return placement.pin(x, batch, seq, ())
