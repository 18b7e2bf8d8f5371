"""How the function is computed does not change it: blocks, rematerialisation, unrolling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jllama.config import BlockwiseAttention
from jllama.model import llama

T = 29
SEGMENTS = np.repeat([[1, 2, 0], [3, 3, 4]], [11, 13, 5], axis=1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def value_and_grads(params, model, compute, tokens, segments):
    def loss(params):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = llama.apply(params, model, compute, tokens, positions, segments)
        out = llama.logits(params, model, hidden)
        return -jnp.mean(jax.nn.log_softmax(out)[..., 7] ** 2), out

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return out, grads


@pytest.fixture(scope="module")
def case():
    model = tiny.config(num_kv_heads=2, qk_norm=True, num_layers=3)
    params, tokens = tiny.params(model, 5.0), tiny.tokens(2, T)
    wanted = {
        name: value_and_grads(params, model, tiny.compute(), tokens, segments)
        for name, segments in (("segments", SEGMENTS), ("whole", None))
    }
    return model, params, tokens, wanted


def check(case, segments="segments", **compute):
    model, params, tokens, wanted = case
    given = SEGMENTS if segments == "segments" else None
    out, grads = value_and_grads(params, model, tiny.compute(**compute), tokens, given)
    assert tiny.relative_error(out, wanted[segments][0]) < 1e-6
    errors = jax.tree.map(tiny.relative_error, grads, wanted[segments][1])
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


@pytest.mark.parametrize(("block", "segments"), [(8, "segments"), (13, "whole")])
def test_attention_in_blocks_equals_one_block(case, block, segments):
    check(case, segments, attention=BlockwiseAttention(kind="blockwise", block=block))


@pytest.mark.parametrize("remat", ["dots", "attention", "full", "offload"])
def test_rematerialisation_changes_no_gradient(case, remat):
    check(case, remat=remat, attention=BlockwiseAttention(kind="blockwise", block=16))


@pytest.mark.parametrize("unroll", [2])
def test_unrolled_layers_are_the_same_layers(case, unroll):
    check(case, scan_unroll=unroll)
