"""Pads embedding and head, and grows them for a larger vocabulary.

V rows, D model width. A tied head is the embedding itself.
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
# A new row is the mean of the rows of the base's pieces that spell the new piece, or the mean of
# all rows, or a draw from the normal distribution with the mean and deviation of each column.
NewRows = Literal["pieces", "mean", "random"]


def _map_tables(params: Params, change: Callable[[str, Any], Any]) -> Params:
    return params | {
        name: {"weight": change(name, params[name]["weight"])} for name in TABLES if name in params
    }


def with_rows(placed: Params, rows: int) -> Params:
    """`llama.placed_shapes` of the same model with `rows` rows in its tables [V,D].

    If their number changes the rows are not sharded, because it may not divide.
    """

    def change(_: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if leaf.shape[0] == rows:
            return leaf
        sharding = whole_rows_sharding(leaf.sharding)
        return leaf.update(shape=(rows, *leaf.shape[1:]), sharding=sharding)

    return _map_tables(placed, change)


def resized(tree: Params, rows: int) -> Params:
    """Parameters, or an overlay, with tables of `rows` rows: cut, or padded with zeros."""
    return _map_tables(tree, lambda _, table: table if len(table) == rows else _resize(table, rows))


def repadded(x: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """The parameter with the number of rows, and the sharding, of its placed shape.

    It appends rows of zeros, or drops the last rows, which are padding. A parameter with the right
    shape is returned as it is.
    """
    if x.shape == leaf.shape:
        return x
    return jax.jit(_resize, static_argnums=1, out_shardings=leaf.sharding)(x, leaf.shape[0])


def _resize(table: jax.Array, rows: int) -> jax.Array:
    table = table[:rows]
    return jnp.pad(table, ((0, rows - table.shape[0]), (0, 0)))


def grow_tables(
    params: Params,
    placed: Params,
    base: int,
    spelt: Sequence[Sequence[int]],
    rows: NewRows,
    seed: int = 0,
) -> Params:
    """The parameters with tables of the base's rows, the new rows, and padding.

    The base's rows keep their bits, and the new rows are computed in float32. A random row depends
    on `seed`, its table and its id, and not on the placement.

    Args:
      placed: `llama.placed_shapes` of the larger model.
      base: the number of ids of the base's tokenizer; later rows of a table had no token.
      spelt: for each new id, from `base` on, the base's ids that spell its text. A new row with no
        ids, such as a special token's, is the mean of all rows. Kinds other than "pieces" use only
        the number of new ids.
    """
    spellings = spelt if rows == "pieces" else [()] * len(spelt)
    lengths = np.array([len(spelling) for spelling in spellings], np.int32)
    ids = np.zeros((max([1, *lengths]), len(spellings)), np.int32)
    for i, spelling in enumerate(spellings):
        ids[: len(spelling), i] = spelling

    def change(name: str, table: jax.Array) -> jax.Array:
        leaf = placed[name]["weight"]
        key = jax.random.fold_in(jax.random.key(seed), TABLES.index(name))
        grown = jax.jit(_grown, static_argnums=(1, 2, 3), out_shardings=leaf.sharding)
        return grown(table, base, leaf.shape[0], rows, ids, lengths, key)

    return _map_tables(params, change)


def _grown(table, base, rows, kind, ids, lengths, key):
    """[V,D] -> [rows,D]: the first `base` rows, a new row for each of `lengths`, and zeros.

    Column i of `ids` [K,new] holds the `lengths[i]` ids that spell new row i.
    """
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

        # One piece of every text at a time; all pieces at once would be several times the table.
        total, _ = lax.scan(add, jnp.zeros(shape, jnp.float32), (jnp.arange(len(ids)), ids))
        count = jnp.maximum(lengths, 1)[:, None]
        new = jnp.where(lengths[:, None] > 0, total / count, mean)
    return _resize(jnp.concatenate([old, new.astype(table.dtype)]), rows)
