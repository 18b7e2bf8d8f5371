"""Reading rows of a table that is spread over devices: what one device would read, bit for bit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jllama.config import MeshConfig, ShardingConfig
from jllama.model.llama import TABLE_AXES
from jllama.parallel.mesh import make_mesh
from jllama.parallel.product import take_rows
from jllama.parallel.sharding import Placement, constrain
from jllama.plan.program import collectives

B, T, D = 8, 16, 32


def setup(vocab, **sizes):
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])
    p = Placement(mesh, ShardingConfig())
    rng = np.random.default_rng(0)
    table = rng.normal(size=(vocab, D)).astype(np.float32)
    tokens = rng.integers(0, vocab, (B, T)).astype(np.int32)
    d_rows = rng.normal(size=(B, T, D)).astype(np.float32)
    where = p.sharding(table.shape, TABLE_AXES, "table")

    def run(table, tokens, d_rows):
        def read(table):
            with p.active():
                x = take_rows(table, tokens, TABLE_AXES, jnp.float32)
                return constrain(x, "batch", "block_seq", "act_embed")

        x, pull = jax.vjp(read, table)
        return x, pull(d_rows)[0]

    jitted = jax.jit(
        run, out_shardings=(p.sharding((B, T, D), ("batch", "block_seq", None), "x"), where)
    )
    batch = p.put_batch({"tokens": tokens, "d_rows": d_rows})
    return (table, tokens, d_rows), jitted, (jax.device_put(table, where), *batch.values())


MESHES = [
    {"fsdp": 8},
    {"fsdp": 2, "tensor": 4},
    {"replica": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 2, "context": 2},
]


@pytest.mark.parametrize("vocab", [96, 97])  # 97 rows stay together: their width is spread further
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rows_and_gradient_are_those_of_one_device(vocab, sizes):
    (table, tokens, d_rows), run, placed = setup(vocab, **sizes)
    x, d_table = run(*placed)
    np.testing.assert_array_equal(x, table[tokens])
    wanted = np.zeros(table.shape, np.float64)
    np.add.at(wanted, tokens, d_rows.astype(np.float64))
    assert tiny.relative_error(d_table, wanted) < 1e-6


@pytest.mark.parametrize("vocab", [96, 97])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_no_device_sees_more_of_the_table_than_its_part(vocab, sizes):
    _, run, placed = setup(vocab, **sizes)
    moved = collectives(run.lower(*placed).compile().as_text())
    copies = sizes.get("replica", 1)
    part = vocab * D * copies // math.prod(sizes.values())
    widths = {vocab, vocab // sizes.get("tensor", 1)}
    tables = [c for c in moved if widths & set(c.array.shape)]
    # Only the gradients of copies are summed, each device its part.
    assert {(c.kind, c.array.elements) for c in tables} <= {("all-reduce", part)}
    assert bool(tables) == (copies > 1)
    rows = B * T * D * sizes.get("tensor", 1) // math.prod(sizes.values())
    assert all(c.array.elements <= rows for c in moved if c not in tables)


def test_without_a_mesh_it_is_plain():
    table = jnp.arange(12.0).reshape(4, 3)
    got = take_rows(table, jnp.array([[3, 0]]), TABLE_AXES, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), table[jnp.array([[3, 0]])])
