"""The causal-LM loss against a float64 LLaMA; positions; padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import reference
import tiny

from jllama.train.loss import causal_lm_loss, row_positions


def test_positions_restart_in_each_segment():
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


def test_the_loss_of_a_batch_equals_that_of_a_float64_llama():
    config = recipes.in_memory("training.z_loss=0.01", "compute.loss_block=40")
    params, batch = tiny.params(config.model, 5.0), recipes.batch(config)
    inputs = batch["segments"][:, :-1]
    positions = np.asarray(row_positions(jnp.asarray(inputs)))
    hidden = reference.logits(params, config.model, batch["tokens"][:, :-1], positions, inputs)
    eye, targets = np.eye(config.model.vocab_size), batch["tokens"][:, 1:]
    loss, nll, *_ = reference.cross_entropy(hidden, eye, targets, batch["weights"][:, 1:], 0.01)
    (got_loss, weight, got_nll), _ = sums(config, params, batch)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert got_nll == pytest.approx(nll, rel=1e-5)
    assert weight == pytest.approx(batch["weights"][:, 1:].sum())


def test_gradients_equal_those_of_the_naive_loss():
    config = recipes.in_memory(
        "compute.loss_block=40", "compute.attention={kind: blockwise, block: 6}"
    )
    params, batch = tiny.params(config.model, 5.0), recipes.batch(config)

    def naive(params):
        inputs = batch["segments"][:, :-1]
        logits = tiny._logits(
            params, config.model, tiny.compute(), batch["tokens"][:, :-1],
            row_positions(jnp.asarray(inputs)), inputs, None,
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
