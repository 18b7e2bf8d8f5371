"""Rotary frequencies and tables."""

import jax
import numpy as np
import pytest
import reference
import tiny

from jllama.config import Llama3RopeScaling
from jllama.model.rope import apply_rope, inverse_frequencies, rope_tables
from jllama.recipe import load_model


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_frequencies_equal_the_reference(name):
    model = tiny.config(**tiny.VARIANTS[name])
    np.testing.assert_allclose(inverse_frequencies(model), reference.frequencies(model), rtol=1e-14)


@pytest.mark.parametrize(
    ("factor", "head_dim", "counts"), [(8.0, 128, (29, 6, 29)), (32.0, 64, (15, 3, 14))]
)
def test_llama3_scaling_keeps_blends_and_divides(factor, head_dim, counts):
    scaling = Llama3RopeScaling(
        kind="llama3", factor=factor, low_freq_factor=1, high_freq_factor=4, original_length=8192
    )
    model = tiny.config(head_dim=head_dim, rope_theta=5e5, rope=scaling)
    scaled = inverse_frequencies(model)
    plain = 5e5 ** -(np.arange(0, head_dim, 2) / head_dim)
    kept, divided = np.isclose(scaled, plain), np.isclose(scaled, plain / factor)
    assert (kept.sum(), (~kept & ~divided).sum(), divided.sum()) == counts
    assert (np.diff(scaled) < 0).all()


def test_llama_3_1_ships_with_its_scaling():
    frequencies = inverse_frequencies(load_model("llama3.1-8b"))
    plain = 5e5 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(frequencies[:29], plain[:29], rtol=1e-14)
    np.testing.assert_allclose(frequencies[35:], plain[35:] / 8, rtol=1e-14)


@pytest.mark.parametrize("name", ["llama1", "llama3.1", "linear-rope"])
def test_tables_are_exact_at_any_position(name):
    model = tiny.config(**tiny.VARIANTS[name], head_dim=128)
    positions = np.array([[0, 1, 1999, 131_071, 10_000_019]])
    cos, sin = jax.jit(lambda p: rope_tables(model, p))(positions)
    angles = positions[0][:, None] * reference.frequencies(model)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angles), atol=1e-6)


def test_scores_depend_on_the_distance_only():
    model = tiny.config()
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, model.head_dim)).astype(np.float32)

    def score(at, of):
        tables = [rope_tables(model, np.array([[p]])) for p in (at, of)]
        return float((apply_rope(q, *tables[0]) * apply_rope(k, *tables[1])).sum())

    assert score(7, 3) == pytest.approx(score(1507, 1503), rel=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 2), rel=1e-2)
