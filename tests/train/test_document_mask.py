"""`data.document_mask: false`: attention over the whole row, as LLaMA 1 and 2 were trained."""

import functools

import jax
import numpy as np
import pytest
import recipes
import reference
import tiny

from jllama.train.loss import causal_lm_loss


@functools.partial(jax.jit, static_argnums=0)
def loss_of(config, params, batch):
    return causal_lm_loss(config, params, (), batch, jax.random.key(0))[0]


@pytest.fixture(scope="module")
def case():
    config = recipes.in_memory("data.document_mask=false")
    return config, tiny.params(config.model, 5.0), recipes.batch(config)


def test_without_the_mask_a_row_is_one_document(case):
    config, params, batch = case
    logits = reference.logits(params, config.model, batch["tokens"][:, :-1])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    wanted = -(batch["weights"][:, 1:] * chosen).sum()
    assert float(loss_of(config, params, batch)) == pytest.approx(wanted, rel=1e-5)
    masked = recipes.replace(config, data={"document_mask": True})
    assert float(loss_of(masked, params, batch)) != pytest.approx(wanted, rel=1e-3)


def test_padding_is_hidden_by_causality_alone(case):
    config, params, batch = case
    other = batch | {"tokens": np.where(batch["segments"] == 0, 7, batch["tokens"])}
    assert (other["tokens"] != batch["tokens"]).any()
    assert loss_of(config, params, other) == loss_of(config, params, batch)
