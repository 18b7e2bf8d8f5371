"""The digest of a state: every bit, place and name counts, and the sharding does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jllama.config import MeshConfig, ShardingConfig
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.store.fingerprint import fingerprint


def tree():
    rng = np.random.default_rng(0)
    return {
        "a": {"weight": rng.normal(size=(16, 8)).astype(np.float32)},
        "b": jnp.asarray(rng.normal(size=(8, 4, 2)), jnp.bfloat16),
        "count": np.int32(7),
        "ids": rng.integers(-100, 100, (8,)).astype(np.int32),
        "bytes": rng.integers(0, 256, (8, 2)).astype(np.uint8),
        "mask": rng.random((8, 3)) < 0.5,
    }


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def changed(path, change):
    """The digest of the tree with one leaf changed as NumPy."""
    new = tree()
    *parents, last = path.split(".")
    node = new
    for name in parents:
        node = node[name]
    node[last] = change(np.array(node[last]))
    return fingerprint(arrays(new))


def test_the_digest_of_a_fixed_tree_is_known():
    # Digests are compared across versions and machines, so they must not change.
    fixed = {
        "a": {"weight": np.arange(12, dtype=np.float32).reshape(3, 4) / 8},
        "step": np.int32(3),
        "half": jnp.arange(4, dtype=jnp.bfloat16),
        "mask": np.array([True, False]),
        "bytes": np.array([0, 255], np.uint8),
    }
    wanted = "065569be0cfba1d994984ec0c586f3c4d06ce33aa4c453fe88552fa535534234"
    assert fingerprint(arrays(fixed)) == wanted


@pytest.mark.parametrize("path", ["a.weight", "b", "count", "ids", "bytes"])
@pytest.mark.parametrize("bit", [0, -1])
def test_one_bit_of_any_element_changes_it(path, bit):
    def flip(x):
        raw = np.frombuffer(x.tobytes(), np.uint8).copy()
        at = np.random.default_rng(1).integers(x.size) * x.itemsize
        # The lowest bit of an element, or its highest: a sign.
        raw[at if bit == 0 else at + x.itemsize - 1] ^= 1 if bit == 0 else 128
        return np.frombuffer(raw.tobytes(), x.dtype).reshape(x.shape)

    assert changed(path, flip) != fingerprint(arrays(tree()))


def test_one_flag_changes_it():
    assert changed("mask", lambda x: x ^ (np.arange(24).reshape(8, 3) == 5)) != fingerprint(
        arrays(tree())
    )


@pytest.mark.parametrize("path", ["a.weight", "b", "ids", "bytes"])
def test_two_elements_swapped_change_it(path):
    def swap(x):
        flat = x.reshape(-1).copy()
        other = int(np.flatnonzero(flat != flat[0])[0])
        flat[[0, other]] = flat[[other, 0]]
        return flat.reshape(x.shape)

    assert changed(path, swap) != fingerprint(arrays(tree()))


def test_two_rows_and_two_columns_swapped_change_it():
    plain = fingerprint(arrays(tree()))
    assert changed("a.weight", lambda x: x[np.r_[1, 0, 2:16]]) != plain
    assert changed("a.weight", lambda x: x[:, np.r_[1, 0, 2:8]]) != plain


def test_names_shapes_and_dtypes_count():
    plain = fingerprint(arrays(tree()))
    renamed = tree()
    renamed["c"] = renamed.pop("b")
    assert fingerprint(arrays(renamed)) != plain
    assert changed("a.weight", lambda x: x.reshape(8, 16)) != plain
    assert changed("ids", lambda x: x.view(np.uint32)) != plain
    assert changed("b", lambda x: x.view(np.uint16)) != plain


def test_minus_zero_and_nan_bits_count():
    zero, minus, nan, other = np.array([0, 1 << 31, 0x7FC00000, 0x7FC00001], np.uint32)
    digests = {
        fingerprint({"x": jnp.asarray(np.array([x], np.uint32).view(np.float32))})
        for x in (zero, minus, nan, other)
    }
    assert len(digests) == 4


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"replica": 8}], ids=str)
def test_it_is_the_same_on_any_mesh(sizes):
    placement = Placement(make_mesh(MeshConfig(**({"fsdp": 1} | sizes))), ShardingConfig())
    placed = jax.tree.map(
        lambda x: jax.device_put(
            x, placement.sharding(x.shape, ("embed", "vocab", None)[: x.ndim], "x")
        ),
        arrays(tree()),
    )
    if "replica" not in sizes:
        assert not placed["a"]["weight"].is_fully_replicated
    assert fingerprint(placed) == fingerprint(arrays(tree()))
