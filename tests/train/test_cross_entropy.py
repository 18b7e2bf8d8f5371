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

from jllama.train.cross_entropy import cross_entropy

B, T, D, V = 3, 12, 8, 29


def case(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    weight = rng.normal(size=(V, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = (rng.random((B, T)) * (rng.random((B, T)) < 0.7)).astype(np.float32)
    return hidden, weight, targets, weights


@functools.partial(jax.jit, static_argnums=(4, 5))
def value_and_grads(hidden, weight, targets, weights, z_loss, block):
    def loss(hidden, weight):
        return cross_entropy(hidden, weight, targets, weights, z_loss, block)

    (value, nll), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, weight)
    return value, nll, *grads


# 5 does not divide the 12 positions, 64 is more than there are.
@pytest.mark.parametrize(("block", "z_loss"), [(1, 0.01), (4, 0.0), (5, 0.01), (64, 0.01)])
def test_values_and_gradients_equal_float64(block, z_loss):
    wanted = reference.cross_entropy(*case(), z_loss)
    for got, want in zip(value_and_grads(*case(), z_loss, block), wanted, strict=True):
        assert tiny.relative_error(got, want) < 2e-6
    without_gradients = cross_entropy(*case(), z_loss, block)
    for got, want in zip(without_gradients, wanted[:2], strict=True):
        assert tiny.relative_error(got, want) < 2e-6


def test_the_gradient_is_scaled_by_what_follows():
    hidden, weight, targets, weights = case()
    wanted = reference.cross_entropy(hidden, weight, targets, weights, 0.0)[3]
    got = jax.grad(lambda w: -3.0 * cross_entropy(hidden, w, targets, weights, 0.0, 4)[0])(weight)
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


@pytest.mark.parametrize(("block", "held"), [(4, 4), (5, 5), (1, 1), (64, 12)])
def test_logits_are_held_for_one_block_at_a_time(block, held):
    def loss(hidden, weight, targets, weights):
        return cross_entropy(hidden, weight, targets, weights, 0.01, block)[0]

    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*case())
    logits = [s for s in shapes(program.jaxpr) if V in s and sorted(s) != sorted((V, D))]
    assert max(map(math.prod, logits)) == B * held * V
