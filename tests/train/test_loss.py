"""The blocked cross-entropy against float64 NumPy; positions; what padding weighs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import reference
import tiny
from jax.extend.core import jaxprs_in_params

from jllama.train.loss import causal_lm_loss, cross_entropy, row_positions

B, T, D, V = 3, 12, 8, 29


def case(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    weight = rng.normal(size=(V, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = (rng.random((B, T)) * (rng.random((B, T)) < 0.7)).astype(np.float32)
    return hidden, weight, targets, weights


def exact(hidden, weight, targets, weights, z_loss):
    """Loss with and without the z term, and the gradients of the first, all in float64."""
    h, w = hidden.astype(np.float64), weight.astype(np.float64)
    logits = h @ w.T
    top = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    onehot = np.eye(len(w))[targets]
    nll = (weights * (log_z[..., 0] - (logits * onehot).sum(-1))).sum()
    loss = nll + z_loss * (weights * log_z[..., 0] ** 2).sum()
    p = np.exp(logits - log_z)
    d_logits = weights[..., None] * (p * (1 + 2 * z_loss * log_z) - onehot)
    return loss, nll, d_logits @ w, np.einsum("btv,btd->vd", d_logits, h)


@functools.partial(jax.jit, static_argnums=(4, 5))
def value_and_grads(hidden, weight, targets, weights, z_loss, block):
    def loss(hidden, weight):
        return cross_entropy(hidden, weight, targets, weights, z_loss, block)

    (value, nll), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, weight)
    return value, nll, *grads


# 5 does not divide the 12 positions, 64 is more than there are.
@pytest.mark.parametrize(("block", "z_loss"), [(1, 0.01), (4, 0.0), (5, 0.01), (64, 0.01)])
def test_values_and_gradients_equal_float64(block, z_loss):
    wanted = exact(*case(), z_loss)
    for got, want in zip(value_and_grads(*case(), z_loss, block), wanted, strict=True):
        assert tiny.relative_error(got, want) < 2e-6
    without_gradients = cross_entropy(*case(), z_loss, block)
    for got, want in zip(without_gradients, wanted[:2], strict=True):
        assert tiny.relative_error(got, want) < 2e-6


def test_the_gradient_is_scaled_by_what_follows():
    hidden, weight, targets, weights = case()
    wanted = exact(hidden, weight, targets, weights, 0.0)[3]
    got = jax.grad(lambda w: -3.0 * cross_entropy(hidden, w, targets, weights, 0.0, 4)[0])(weight)
    assert tiny.relative_error(got, -3.0 * wanted) < 2e-6


def test_large_logits_neither_overflow_nor_lose_the_loss():
    hidden, weight, targets, weights = case()
    wanted = exact(100 * hidden, weight, targets, weights, 0.0)
    for got, want in zip(
        value_and_grads(100 * hidden, weight, targets, weights, 0.0, 4), wanted, strict=True
    ):
        assert np.isfinite(got).all()
        assert tiny.relative_error(got, want) < 1e-5


def test_bfloat16_is_near_and_its_sums_are_float32():
    hidden, weight, targets, weights = case()
    wanted = exact(hidden, weight, targets, weights, 0.01)
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


@pytest.mark.parametrize(("block", "held"), [(4, 4), (5, 5), (1, 1), (64, 12)])
def test_logits_are_held_for_one_block_at_a_time(block, held):
    def loss(hidden, weight, targets, weights):
        return cross_entropy(hidden, weight, targets, weights, 0.01, block)[0]

    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*case())
    logits = [s for s in shapes(program.jaxpr) if V in s and sorted(s) != sorted((V, D))]
    assert max(map(math.prod, logits)) == B * held * V


def test_positions_start_anew_in_each_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
    wanted = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert row_positions(segments).tolist() == wanted


@functools.partial(jax.jit, static_argnums=0)
def sums(config, params, batch):
    def loss(params):
        loss, weight, more = causal_lm_loss(config, params, (), batch, jax.random.key(0))
        return loss, (loss, weight, more["nll_sum"])

    grads, out = jax.grad(loss, has_aux=True)(params)
    return out, grads


def test_the_loss_of_a_batch_is_that_of_a_float64_llama():
    config = recipes.in_memory("training.z_loss=0.01", "compute.loss_block=5")
    params, batch = tiny.params(config.model, 5.0), recipes.batch(config)
    inputs = batch["segments"][:, :-1]
    positions = np.asarray(row_positions(jnp.asarray(inputs)))
    hidden = reference.logits(params, config.model, batch["tokens"][:, :-1], positions, inputs)
    eye, targets = np.eye(config.model.vocab_size), batch["tokens"][:, 1:]
    loss, nll, *_ = exact(hidden, eye, targets, batch["weights"][:, 1:], 0.01)
    (got_loss, weight, got_nll), _ = sums(config, params, batch)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert got_nll == pytest.approx(nll, rel=1e-5)
    assert weight == pytest.approx(batch["weights"][:, 1:].sum())


def test_gradients_are_those_of_the_naive_loss():
    config = recipes.in_memory(
        "compute.loss_block=5", "compute.attention={kind: blockwise, block: 6}"
    )
    params, batch = tiny.params(config.model, 5.0), recipes.batch(config)

    def naive(params):
        inputs = batch["segments"][:, :-1]
        logits = tiny._logits(
            params, config.model, tiny.compute(), batch["tokens"][:, :-1],
            row_positions(jnp.asarray(inputs)), inputs,
        )  # fmt: skip
        log_p = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(batch["weights"][:, 1:] * chosen)

    wanted = jax.jit(jax.grad(naive))(params)
    _, got = sums(config, params, batch)
    errors = jax.tree.map(tiny.relative_error, got, wanted)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


def test_rows_of_padding_change_no_sum_and_no_gradient():
    config = recipes.in_memory()
    params, batch = tiny.params(config.model, 5.0), recipes.batch(config)
    padded = {k: np.concatenate([v, np.zeros_like(v[:2])]) for k, v in batch.items()}
    (wanted, wanted_grads), (got, grads) = (sums(config, params, b) for b in (batch, padded))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    errors = jax.tree.map(tiny.relative_error, grads, wanted_grads)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors
