"""Rows of a table that is spread over the devices."""

from typing import Any

import jax
import jax.numpy as jnp

from jllama.parallel.sharding import active_placement

# B rows of tokens, T positions, V vocabulary, D width.


def take_rows(table: jax.Array, tokens: jax.Array, axes: tuple[str, str], dtype: Any) -> jax.Array:
    """`table[tokens]` in `dtype`: table [V,D] of logical `axes`, tokens [B,T] -> [B,T,D].

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
