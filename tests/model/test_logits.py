"""Logits against the float64 reference."""

import numpy as np
import pytest
import reference
import tiny

LIMIT = 1e-5


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_float32_logits_equal_the_float64_reference_at_near_and_far_positions(name):
    model = tiny.config(**tiny.VARIANTS[name])
    params, tokens = tiny.params(model), tiny.tokens(3, 32)
    positions = np.array([[0], [1000], [1968]]) + np.arange(32)
    got = tiny.logits(params, model, tokens, positions)
    assert tiny.relative_error(got, reference.logits(params, model, tokens, positions)) < LIMIT


@pytest.mark.parametrize("name", ["llama1", "llama3.1", "dynamic", "yarn"])
def test_float32_logits_equal_the_float64_reference_in_a_row_of_2000(name):
    small = {"num_layers": 2, "hidden_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    model = tiny.config(**tiny.VARIANTS[name] | small)
    params, tokens = tiny.params(model), tiny.tokens(1, 2000)
    got = tiny.logits(params, model, tokens)
    assert tiny.relative_error(got, reference.logits(params, model, tokens)) < LIMIT


@pytest.mark.parametrize("name", ["llama3.1", "qk-norm", "yarn", "adaptive-2"])
def test_float32_logits_equal_the_reference_with_large_weights_and_at_any_position(name):
    # Weights five times as large make attention sharp, so that a wrong angle shows.
    model = tiny.config(**tiny.VARIANTS[name])
    params, tokens = tiny.params(model, scale=5.0), tiny.tokens(2, 32)
    positions = np.array([[1968], [1_000_000]]) + np.arange(32)
    got = tiny.logits(params, model, tokens, positions)
    assert tiny.relative_error(got, reference.logits(params, model, tokens, positions)) < LIMIT


@pytest.mark.parametrize("name", ["llama1", "llama3.1", "qk-norm"])
def test_segments_equal_the_reference(name):
    model = tiny.config(**tiny.VARIANTS[name])
    params, tokens = tiny.params(model, scale=5.0), tiny.tokens(2, 24)
    segments = np.repeat([[1, 2, 3, 0], [4, 4, 5, 0]], [5, 9, 7, 3], axis=1)
    got = tiny.logits(params, model, tokens, segments=segments)
    assert tiny.relative_error(got, reference.logits(params, model, tokens, None, segments)) < LIMIT


@pytest.mark.parametrize("name", ["llama3.1", "tied", "qk-norm"])
def test_bfloat16_logits_are_near_and_float32(name):
    model = tiny.config(**tiny.VARIANTS[name])
    params, tokens = tiny.params(model), tiny.tokens(2, 32)
    got = tiny.logits(params, model, tokens, cpt=tiny.compute("bfloat16"))
    assert got.dtype == np.float32
    assert 1e-5 < tiny.relative_error(got, reference.logits(params, model, tokens)) < 0.03


@pytest.mark.parametrize(
    "change", [{"rope": tiny.LINEAR}, {"rope_theta": 5e5}, {"rms_norm_eps": 1e-4}]
)
def test_the_reference_sees_a_wrong_constant(change):
    model = tiny.config()
    params, tokens = tiny.params(model), tiny.tokens(1, 32)
    other = tiny.logits(params, tiny.config(**change), tokens)
    assert tiny.relative_error(other, reference.logits(params, model, tokens)) > 2 * LIMIT
