"""A model grown to a larger vocabulary: old rows keep their bits, new rows are what was asked."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from jllama.adapt import vocab
from jllama.config import MeshConfig, ShardingConfig
from jllama.model import llama
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement

BASE = tiny.config(vocab_size=50, num_layers=2, num_kv_heads=2, max_length=64)
# Ids 50 to 54; the fourth is a special token.
SPELT = [[3, 4, 5], [7], [7, 7, 9, 49], [], [0, 1]]
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@functools.cache
def fresh(model=BASE, scale=1.0):
    return tiny.params(model, scale)


def grown(params, model, rows, mesh=None, dtype="float32", base=50, seed=0):
    larger = dataclasses.replace(model, vocab_size=base + len(SPELT), vocab_multiple=16)
    devices = jax.devices()[: 8 if mesh else 1]
    placement = Placement(make_mesh(MeshConfig(**mesh or {}), devices), ShardingConfig())
    placed = llama.placed_shapes(larger, placement, dtype, "float32")
    return vocab.grow_tables(params, placed, base, SPELT, rows, seed), placed, larger


def expected(table, rows):
    wide = np.asarray(table, np.float64)
    mean = wide.mean(0)
    return [wide[ids].mean(0) if ids and rows == "pieces" else mean for ids in SPELT]


@TIED
@pytest.mark.parametrize("rows", ["pieces", "mean", "random"])
def test_old_rows_keep_their_bits_and_new_ones_are_as_asked(rows, tied):
    model = dataclasses.replace(BASE, tie_embeddings=tied)
    params = fresh(model)
    got, _, _ = grown(params, model, rows)
    for name in vocab.TABLES[: 2 - tied]:
        table, old = np.asarray(got[name]["weight"]), np.asarray(params[name]["weight"])
        assert table.shape == (64, 48)
        np.testing.assert_array_equal(table[:50], old)
        assert not table[55:].any()
        if rows == "random":
            assert len(np.unique(table[50:55])) == 5 * 48
            scores = (table[50:55] - old.mean(0)) / old.std(0)
            assert abs(scores.mean()) < 0.3 and abs(scores.std() - 1) < 0.2
        else:
            np.testing.assert_allclose(table[50:55], expected(old, rows), rtol=1e-5, atol=1e-8)
    assert ("head" in got) == (not tied)
    assert got["layers"] is params["layers"]


@pytest.mark.parametrize("rows", ["pieces", "random"])
def test_the_same_on_any_mesh_in_the_places_of_the_parameters(rows):
    params = fresh()
    wanted, _, _ = grown(params, BASE, rows)
    for mesh in ({"fsdp": 8}, {"fsdp": 2, "tensor": 4}):
        placement = Placement(make_mesh(MeshConfig(**mesh)), ShardingConfig())
        where = llama.placed_shapes(BASE, placement, "float32", "float32")
        spread = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params, where)
        got, placed, _ = grown(spread, BASE, rows, mesh)
        for name in vocab.TABLES:
            assert got[name]["weight"].sharding == placed[name]["weight"].sharding
            np.testing.assert_allclose(
                got[name]["weight"], wanted[name]["weight"], rtol=1e-5, atol=1e-8
            )
            np.testing.assert_array_equal(got[name]["weight"][:50], params[name]["weight"])


def test_random_rows_depend_on_the_seed_and_differ_between_the_tables():
    params = fresh()
    one, again, other = (
        np.asarray(grown(params, BASE, "random", seed=seed)[0]["head"]["weight"][50:55])
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert tiny.relative_error(one, other) > 0.1
    table = grown(params, BASE, "random", seed=1)[0]["embedding"]["weight"][50:55]
    assert tiny.relative_error(one, table) > 0.1


@pytest.mark.optimized
@TIED
def test_logits_of_old_tokens_are_unchanged_to_the_bit(tied):
    model = dataclasses.replace(BASE, tie_embeddings=tied)
    params = fresh(model, 5.0)
    got, _, larger = grown(params, model, "pieces")
    tokens = tiny.tokens(2, 20, vocab_size=50)
    wanted = tiny.logits(params, model, tokens)
    after = tiny.logits(got, larger, tokens)
    assert after.shape == (2, 20, 55)
    np.testing.assert_array_equal(after[..., :50], wanted)


def test_rows_without_a_token_are_taken():
    params = fresh()
    got, _, _ = grown(params, BASE, "pieces", base=47)
    table = np.asarray(got["embedding"]["weight"])
    assert table.shape == (64, 48)
    np.testing.assert_array_equal(table[:47], params["embedding"]["weight"][:47])
    np.testing.assert_allclose(table[48], table[7], rtol=1e-6)


def test_half_precision_means_are_of_float32_sums():
    params = jax.tree.map(lambda x: x.astype("bfloat16"), fresh())
    got, _, _ = grown(params, BASE, "pieces", dtype="bfloat16")
    table, old = got["embedding"]["weight"], params["embedding"]["weight"]
    assert table.dtype == "bfloat16"
    wanted = np.array(expected(old, "pieces"), np.float32).astype(table.dtype)
    np.testing.assert_allclose(
        np.asarray(table[50:55], np.float32), np.asarray(wanted, np.float32), rtol=1 / 128
    )
