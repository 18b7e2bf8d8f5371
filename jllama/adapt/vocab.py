"""Embedding and head for another vocabulary: padded, and grown by new rows.

V rows, D model width. A tied head is the embedding, and grows with it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jllama.model.llama import Params
from jllama.parallel.sharding import with_whole_rows

TABLES = ("embedding", "head")


def _tables(params: Params, change: Callable[[Any], Any]) -> Params:
    return params | {
        name: {"weight": change(params[name]["weight"])} for name in TABLES if name in params
    }


def with_rows(placed: Params, rows: int) -> Params:
    """`llama.placed_shapes` of the same model with `rows` [V,D] in its tables.

    Where that is another number the rows are not spread: they may not divide.
    """

    def change(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if leaf.shape[0] == rows:
            return leaf
        shape = (rows, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=with_whole_rows(leaf.sharding))

    return _tables(placed, change)


def repadded(params: Params, placed: Params) -> Params:
    """Parameters whose tables have as many rows as those of `placed`, and lie where they do.

    Rows beyond are zeros, and rows too many are dropped: both are padding. All else is unchanged.
    """
    wanted = iter([placed[name]["weight"] for name in TABLES if name in params])

    def change(table: jax.Array) -> jax.Array:
        leaf = next(wanted)
        if table.shape == leaf.shape:
            return table
        return jax.jit(_resize, static_argnums=1, out_shardings=leaf.sharding)(table, leaf.shape[0])

    return _tables(params, change)


def _resize(table: jax.Array, rows: int) -> jax.Array:
    kept = table[:rows]
    return jnp.pad(kept, ((0, rows - kept.shape[0]), (0, 0)))
