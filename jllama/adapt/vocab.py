"""Embedding and head for another vocabulary: padded, and grown by new rows.

V rows, D model width. A tied head is the embedding, and grows with it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jllama.model.llama import Params
from jllama.parallel.sharding import whole_rows_sharding

TABLES = ("embedding", "head")
# How a new row is made: the mean of the rows of the base's pieces that spell it, the mean of all
# rows, or a draw from the normal distribution with each column's own mean and standard deviation.
NewRows = Literal["pieces", "mean", "random"]


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
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=whole_rows_sharding(leaf.sharding))

    return _tables(placed, change)


def resized(tree: Params, rows: int) -> Params:
    """Parameters, or an overlay, whose tables have `rows`: cut, or padded with zeros."""
    return _tables(tree, lambda table: table if len(table) == rows else _resize(table, rows))


def repadded(x: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A parameter with as many rows as its placed shape has, and where that lies.

    Rows beyond are zeros, and rows too many are dropped: both are padding. All else is unchanged.
    """
    if x.shape == leaf.shape:
        return x
    return jax.jit(_resize, static_argnums=1, out_shardings=leaf.sharding)(x, leaf.shape[0])


def _resize(table: jax.Array, rows: int) -> jax.Array:
    kept = table[:rows]
    return jnp.pad(kept, ((0, rows - kept.shape[0]), (0, 0)))


def grow(
    params: Params,
    placed: Params,
    base: int,
    spelt: Sequence[Sequence[int]],
    rows: NewRows,
    seed: int = 0,
) -> Params:
    """Parameters of a larger vocabulary: the base's rows, new rows, padding.

    The base's rows keep their bits; what is new is computed in float32. Deterministic: a random row
    depends on `seed`, its table and its id, and on nothing of the placement.

    Args:
      placed: `llama.placed_shapes` of the larger model.
      base: ids of the base's tokenizer; rows that a table has from there on had no token.
      spelt: for each new id, from `base` on, the base's ids of its text. For "pieces"; an empty
        one, as a special token's, gets the mean of all. Otherwise their number counts alone.
    """
    wanted = iter([(name, placed[name]["weight"]) for name in TABLES if name in params])
    most = max(map(len, spelt), default=0) if rows == "pieces" else 0
    ids = np.zeros((max(most, 1), len(spelt)), np.int32)
    for i, some in enumerate(spelt if rows == "pieces" else ()):
        ids[: len(some), i] = some
    lengths = np.array([len(some) if rows == "pieces" else 0 for some in spelt], np.int32)

    def change(table: jax.Array) -> jax.Array:
        name, leaf = next(wanted)
        key = jax.random.fold_in(jax.random.key(seed), TABLES.index(name))
        made = jax.jit(_grown, static_argnums=(1, 2, 3), out_shardings=leaf.sharding)
        return made(table, base, leaf.shape[0], rows, ids, lengths, key)

    return _tables(params, change)


def _grown(table, base, rows, kind, ids, lengths, key):
    """[V,D] -> [rows,D]: `base` old rows, one for each of `lengths`, zeros; ids [K,new]."""
    old = table[:base]
    wide = old.astype(jnp.float32)
    mean = jnp.mean(wide, axis=0)
    shape = (lengths.shape[0], table.shape[1])
    if kind == "random":
        new = mean + jnp.std(wide, axis=0) * jax.random.normal(key, shape, jnp.float32)
    else:

        def add(total, xs):
            at, ids = xs
            row = jnp.take(old, ids, axis=0).astype(jnp.float32)
            return total + jnp.where((at < lengths)[:, None], row, 0.0), None

        # One piece of each text at a time: all at once are several times the table.
        total, _ = lax.scan(add, jnp.zeros(shape, jnp.float32), (jnp.arange(len(ids)), ids))
        count = jnp.maximum(lengths, 1)[:, None]
        new = jnp.where(lengths[:, None] > 0, total / count, mean)
    return _resize(jnp.concatenate([old, new.astype(table.dtype)]), rows)
