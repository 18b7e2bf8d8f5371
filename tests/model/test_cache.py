"""Cached decoding against the whole row."""

import functools

import jax
import numpy as np
import pytest
import reference
import tiny

from jllama.model import llama
from jllama.model.attention import init_cache
from jllama.model.rope import turns

CASES = ["llama1", "llama3.1", "llama3.2", "qk-norm"]
KINDS = ["linear-rope", "ntk", "dynamic", "adaptive-1", "adaptive-2", "yarn"]
# Sharp attention, so that a key in a wrong slot shows.
SCALE = 5.0


@functools.partial(jax.jit, static_argnums=(1, 2))
def step(params, model, compute, tokens, positions, cache, turns=None):
    hidden, cache = llama.apply(params, model, compute, tokens, positions, cache=cache, turns=turns)
    return llama.logits(params, model, hidden), cache


@pytest.mark.parametrize("name", [*CASES, *KINDS])
def test_prefill_in_chunks_then_decode_equals_the_full_forward(name):
    model, compute = tiny.config(**tiny.VARIANTS[name]), tiny.compute()
    params, tokens = tiny.params(model, SCALE), tiny.tokens(2, 24)
    cache, out = init_cache(model, compute, 2, 32), []
    for start, end in ((0, 8), (8, 16), *((t, t + 1) for t in range(16, 24))):
        positions = np.tile(np.arange(start, end), (2, 1))
        part = tokens[:, start:end]
        # The length of the whole text, whatever part of it is read.
        got, cache = step(params, model, compute, part, positions, cache, turns(model, 24))
        out.append(got)
    full = tiny.logits(params, model, tokens)
    assert tiny.relative_error(np.concatenate(out, axis=1), full) < 1e-5


@pytest.mark.parametrize("name", ["dynamic", "adaptive-2"])
def test_rows_of_several_lengths_equal_each_row_alone(name):
    model, compute = tiny.config(**tiny.VARIANTS[name]), tiny.compute()
    params, tokens, lengths = tiny.params(model, SCALE), tiny.tokens(3, 12), (12, 30, 100)
    angles, cache, out = turns(model, lengths), init_cache(model, compute, 3, 16), []
    for start, end in ((0, 8), *((t, t + 1) for t in range(8, 12))):
        positions = np.tile(np.arange(start, end), (3, 1))
        got, cache = step(params, model, compute, tokens[:, start:end], positions, cache, angles)
        out.append(got)
    out = np.concatenate(out, axis=1)
    wanted = [
        reference.logits(params, model, tokens[[row]], length=length)[0]
        for row, length in enumerate(lengths)
    ]
    assert tiny.relative_error(out, wanted) < 1e-5
    assert (
        tiny.relative_error(out[0], reference.logits(params, model, tokens[:1], length=30)) > 1e-3
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fill", [0, 96])
def test_ragged_rows_with_right_padding_equal_each_row_alone(name, fill):
    model, compute = tiny.config(**tiny.VARIANTS[name]), tiny.compute()
    params, rows = tiny.params(model, SCALE), tiny.tokens(3, 20)
    lengths = np.array([3, 16, 9])
    padded = np.where(np.arange(16) < lengths[:, None], rows[:, :16], fill)
    positions = np.tile(np.arange(16), (3, 1))
    cache = init_cache(model, compute, 3, 20)
    got, cache = step(params, model, compute, padded, positions, cache)
    full = tiny.logits(params, model, rows)
    for row, length in enumerate(lengths):
        assert tiny.relative_error(got[row, :length], full[row, :length]) < 1e-5
    for _ in range(4):  # decoding overwrites the padding, each row at its own position
        token = rows[np.arange(3), lengths][:, None]
        got, cache = step(params, model, compute, token, lengths[:, None], cache)
        assert tiny.relative_error(got[:, 0], full[np.arange(3), lengths]) < 1e-5
        lengths = lengths + 1


def test_what_unwritten_slots_hold_never_matters():
    model, compute = tiny.config(), tiny.compute()
    params, tokens = tiny.params(model, SCALE), tiny.tokens(2, 8)
    positions = np.tile(np.arange(8), (2, 1))
    clean = init_cache(model, compute, 2, 16)
    dirty = jax.tree.map(lambda x: x + 1e3, clean)
    a, _ = step(params, model, compute, tokens, positions, clean)
    b, _ = step(params, model, compute, tokens, positions, dirty)
    np.testing.assert_array_equal(a, b)


def test_cache_of_bfloat16_computation_is_bfloat16_and_near():
    model, compute = tiny.config(**tiny.VARIANTS["llama3.1"]), tiny.compute("bfloat16")
    params, tokens = tiny.params(model), tiny.tokens(2, 12)
    cache = init_cache(model, compute, 2, 12)
    got, cache = step(params, model, compute, tokens, np.tile(np.arange(12), (2, 1)), cache)
    assert cache.k.dtype == cache.v.dtype == "bfloat16"
    assert cache.k.shape == (3, 2, 2, 12, 16)
    full = tiny.logits(params, model, tokens, cpt=compute)
    assert tiny.relative_error(got, full) < 0.02
