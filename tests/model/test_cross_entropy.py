"""The blocked cross-entropy against float64 NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from jax.extend.core import jaxprs_in_params

from jllama.config import MeshConfig, ShardingConfig
from jllama.model.cross_entropy import cross_entropy
from jllama.model.llama import TABLE_AXES
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.plan.program import collectives

B, T, D, V = 3, 12, 8, 29


def case(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    weight = rng.normal(size=(V, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = (rng.random((B, T)) * (rng.random((B, T)) < 0.7)).astype(np.float32)
    return hidden, weight, targets, weights


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def value_and_grads(hidden, weight, targets, weights, z_loss, block, vocab_size=V):
    def loss(hidden, weight):
        return cross_entropy(hidden, weight, targets, weights, z_loss, block, vocab_size)

    (value, nll), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, weight)
    return value, nll, *grads


# 5 does not divide the 12 positions, 64 is more than there are.
@pytest.mark.parametrize(("block", "z_loss"), [(1, 0.01), (12, 0.0), (15, 0.01), (64, 0.01)])
def test_values_and_gradients_equal_float64(block, z_loss):
    wanted = reference.cross_entropy(*case(), z_loss)
    for got, want in zip(value_and_grads(*case(), z_loss, block), wanted, strict=True):
        assert tiny.relative_error(got, want) < 2e-6
    without_gradients = cross_entropy(*case(), z_loss, block, V)
    for got, want in zip(without_gradients, wanted[:2], strict=True):
        assert tiny.relative_error(got, want) < 2e-6


def test_the_gradient_is_scaled_by_what_follows():
    hidden, weight, targets, weights = case()
    wanted = reference.cross_entropy(hidden, weight, targets, weights, 0.0)[3]
    got = jax.grad(lambda w: -3.0 * cross_entropy(hidden, w, targets, weights, 0.0, 4, V)[0])(
        weight
    )
    assert tiny.relative_error(got, -3.0 * wanted) < 2e-6


def test_large_logits_neither_overflow_nor_lose_the_loss():
    hidden, weight, targets, weights = case()
    wanted = reference.cross_entropy(100 * hidden, weight, targets, weights, 0.0)
    for got, want in zip(
        value_and_grads(100 * hidden, weight, targets, weights, 0.0, 4), wanted, strict=True
    ):
        assert np.isfinite(got).all()
        assert tiny.relative_error(got, want) < 1e-5


def test_bfloat16_is_near_and_its_sums_are_float32():
    hidden, weight, targets, weights = case()
    wanted = reference.cross_entropy(hidden, weight, targets, weights, 0.01)
    half = (jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16))
    got = value_and_grads(*half, targets, weights, 0.01, 4)
    assert [x.dtype for x in got] == [jnp.float32] * 2 + [jnp.bfloat16] * 2
    for value, want in zip(got, wanted, strict=True):
        assert tiny.relative_error(value, want) < 0.02


def shapes(jaxpr):
    """The shape of every value in a program and in the programs inside it."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from shapes(inner)


@pytest.mark.parametrize(("block", "held"), [(12, 4), (17, 5), (1, 1), (64, 12)])
def test_logits_are_held_for_one_block_at_a_time(block, held):
    def loss(hidden, weight, targets, weights):
        return cross_entropy(hidden, weight, targets, weights, 0.01, block, V)[0]

    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*case())
    logits = [s for s in shapes(program.jaxpr) if V in s and sorted(s) != sorted((V, D))]
    assert max(map(math.prod, logits)) == B * held * V


def test_a_block_that_is_not_named_fits_the_cache_of_a_cpu():
    def loss(hidden, targets):
        weight, weights = jnp.zeros((V, D)), jnp.ones((1, 2000))
        return cross_entropy(hidden, weight, targets, weights, 0.0, None, V)[0]

    program = jax.make_jaxpr(loss)(jnp.zeros((1, 2000, D)), jnp.zeros((1, 2000), jnp.int32))
    assert (1, 512, V) in shapes(program.jaxpr) and (1, 1024, V) not in shapes(program.jaxpr)


MESHES = [
    {"fsdp": 8},
    {"fsdp": 2, "tensor": 4},
    {"replica": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 2, "context": 2},
    {"context": 8},
]


def padded(weight, d_weight, rows):
    """A head with rows beyond its vocabulary that would matter, and its gradient: zeros there."""
    junk = np.random.default_rng(2).normal(size=(rows, weight.shape[1])).astype(np.float32) * 3
    return np.concatenate([weight, junk]), np.pad(d_weight, ((0, rows), (0, 0)))


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 2e-6), ("bfloat16", 0.02)])
def test_padding_rows_are_no_tokens_and_get_no_gradient(dtype, limit):
    hidden, weight, targets, weights = case()
    *wanted, d_weight = reference.cross_entropy(hidden, weight, targets, weights, 0.01)
    weight, d_weight = padded(weight, d_weight, 3)
    half = (jnp.asarray(hidden, dtype), jnp.asarray(weight, dtype))
    got = value_and_grads(*half, targets, weights, 0.01, 15)
    for value, want in zip(got, (*wanted, d_weight), strict=True):
        assert tiny.relative_error(value, want) < limit
    assert not got[3][V:].any()
    counted = value_and_grads(*half, targets, weights, 0.01, 15, V + 3)[0]
    assert tiny.relative_error(counted, wanted[0]) > 0.05


def test_without_padding_the_program_has_no_mask():
    def program(vocab_size):
        return str(
            jax.make_jaxpr(lambda *args: value_and_grads(*args, 0.0, 4, vocab_size))(*case())
        )

    assert "-1e+30" in program(V - 1)
    assert "-1e+30" not in program(V)


def on_mesh(sizes, positions, vocab, block=10, z_loss=0.01, rules=None, padding=0):
    """The case at other sizes, its exact results and those of eight devices, and the program."""
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(8, positions, 16)).astype(np.float32)
    weight = rng.normal(size=(vocab, 16)).astype(np.float32)
    targets = rng.integers(0, vocab, (8, positions)).astype(np.int32)
    weights = (rng.random((8, positions)) * (rng.random((8, positions)) < 0.7)).astype(np.float32)
    *wanted, d_weight = reference.cross_entropy(hidden, weight, targets, weights, z_loss)
    weight, d_weight = padded(weight, d_weight, padding)
    wanted.append(d_weight)
    p = Placement(make_mesh(MeshConfig(**{"fsdp": 1, **sizes})), ShardingConfig(**rules or {}))
    row = p.sharding(targets.shape, ("batch", "seq"), "row")
    where = (
        p.sharding(hidden.shape, ("batch", "block_seq", None), "hidden"),
        p.sharding(weight.shape, TABLE_AXES, "head"),
    )

    def run(*args):
        with p.active():
            # Not the jitted one: what was traced for another mesh is not to be used again.
            return value_and_grads.__wrapped__(*args, z_loss, block, vocab)

    program = jax.jit(run, in_shardings=(*where, row, row), out_shardings=(None, None, *where))
    return wanted, program, (hidden, weight, targets, weights)


@pytest.mark.parametrize("vocab", [48, 47])  # 47 is prime: every device has the whole vocabulary
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_eight_devices_give_what_one_gives(sizes, vocab):
    wanted, program, args = on_mesh(sizes, 16, vocab)
    for got, want in zip(program(*args), wanted, strict=True):
        assert tiny.relative_error(got, want) < 2e-6


@pytest.mark.parametrize("vocab", [48, 47, 33])  # 33: a device has nothing but padding
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_padding_is_masked_in_every_part_of_the_vocabulary(sizes, vocab):
    rows = 48 if vocab == 33 else 56
    wanted, program, args = on_mesh(sizes, 16, vocab, padding=rows - vocab)
    got = program(*args)
    for value, want in zip(got, wanted, strict=True):
        assert tiny.relative_error(value, want) < 2e-6
    assert not np.asarray(got[3])[vocab:].any()


@pytest.mark.parametrize(
    ("vocab", "rules"),
    [
        (48, {}),  # 14 positions do not divide by four
        (47, {}),  # and nor does the vocabulary: nothing is left for the tensor devices
        (48, {"block_seq": (("tensor", "context"), None)}),  # the outer of two axes is gathered
        (48, {"vocab": (("fsdp",),), "table_embed": (("tensor",),)}),
    ],
    ids=str,
)
def test_what_cannot_be_shared_out_is_still_counted_once(vocab, rules):
    sizes = {"fsdp": 2, "tensor": 4} if not rules else {"fsdp": 2, "tensor": 2, "context": 2}
    wanted, program, args = on_mesh(sizes, 16 if rules else 14, vocab, rules=rules)
    for got, want in zip(program(*args), wanted, strict=True):
        assert tiny.relative_error(got, want) < 2e-6


@pytest.mark.parametrize(
    ("sizes", "vocab"),
    [({"fsdp": 8}, 48), ({"fsdp": 2, "tensor": 4}, 48), ({"fsdp": 2, "tensor": 4}, 47)],
)
def test_the_head_moves_once_and_not_once_a_block(sizes, vocab):
    _, program, args = on_mesh(sizes, 16, vocab, block=2 * 8 // sizes["fsdp"])
    moved = collectives(program.lower(*args).compile().as_text())
    tensor = sizes.get("tensor", 1)
    split = tensor if vocab % tensor == 0 else 1
    head = [(c.kind, c.times) for c in moved if c.array.shape == (vocab // split, 16)]
    assert head == [("all-gather", 1)]
    # The gradient, of which a device keeps its part of the width.
    parts = sizes["fsdp"] * (tensor if split == 1 else 1)
    scattered = [
        (c.array.dtype, c.ways, c.array.elements, c.times)
        for c in moved
        if c.kind == "reduce-scatter" and c.array.shape[-1] == vocab // split
    ]
    assert scattered == [("f32", parts, 16 * (vocab // split), 1)]
    if split > 1:
        # Per block: the largest logit, the sum of exponentials and the target's logit.
        blocks = [c for c in moved if c.times > 1]
        assert sum(c.kind == "all-reduce" and c.times == 8 for c in blocks) == len(blocks) == 3
        assert all(c.array.elements == 8 // sizes["fsdp"] * 2 for c in blocks)
    else:
        assert all(c.times == 1 for c in moved)


@pytest.mark.parametrize("block", [12, 64])  # several blocks, and one, whose loop XLA unrolls
def test_bfloat16_is_within_its_rounding_on_a_cpu_too(block):
    hidden, weight, targets, weights = case()
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    rounded = np.asarray(jnp.asarray(weight, jnp.bfloat16), np.float32)  # as it is cast for use
    wanted = reference.cross_entropy(np.asarray(hidden, np.float32), rounded, targets, weights, 0.0)
    got = value_and_grads(hidden, weight, targets, weights, 0.0, block)
    assert got[3].dtype == jnp.float32
    for found, want in zip(got, wanted, strict=True):
        assert tiny.relative_error(np.asarray(found, np.float32), want) < 1e-2
