"""Rotary frequencies and tables."""

import jax
import numpy as np
import pytest
import reference
import tiny

from jllama.config import Llama3RopeScaling, YarnRopeScaling
from jllama.config.recipe import load_model
from jllama.model import llama
from jllama.model.attention import init_cache
from jllama.model.rope import (
    apply_rope,
    attention_factor,
    inverse_frequencies,
    rope_tables,
    turns,
)


def test_on_a_tpu_a_product_exchanges_the_halves_bit_for_bit(monkeypatch):
    tables = rope_tables(turns(tiny.config(head_dim=16)), np.arange(40)[None])
    for dtype in ("float32", "bfloat16"):
        x, d = (
            jax.random.normal(jax.random.key(k), (1, 40, 3, 16)).astype(dtype) for k in range(2)
        )

        def both(x, d):
            y, pull = jax.vjp(lambda x: apply_rope(x, *tables), x)
            return y, pull(d)[0]

        plain = both(x, d)
        with monkeypatch.context() as patched:
            patched.setattr("jllama.model.rope.platform", lambda: "tpu")
            turned = both(x, d)
        for got, want in zip(turned, plain, strict=True):
            assert got.dtype == want.dtype == dtype
            np.testing.assert_array_equal(got, want)


LENGTHS = (5, 16, 17, 100, 2048)  # below, at and above the original length of tiny's kinds


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_frequencies_equal_the_reference(name):
    model = tiny.config(**tiny.VARIANTS[name])
    for length in LENGTHS:
        wanted = reference.frequencies(model, length)
        np.testing.assert_allclose(inverse_frequencies(model, length), wanted, rtol=1e-14)


@pytest.mark.parametrize("name", ["dynamic", "adaptive-1", "adaptive-2"])
def test_several_lengths_give_a_row_each(name):
    model = tiny.config(**tiny.VARIANTS[name])
    rows = inverse_frequencies(model, LENGTHS)
    wanted = [reference.frequencies(model, length) for length in LENGTHS]
    np.testing.assert_allclose(rows, wanted, rtol=1e-14)
    assert turns(model, LENGTHS).whole.shape == rows.shape == (5, 8)
    np.testing.assert_array_equal(rows[0], rows[1])  # up to the original length nothing changes
    assert (rows[1, 1:] > rows[2, 1:]).all() and (rows[2, 1:] > rows[3, 1:]).all()


def test_chinese_llama_version_1_jumps_past_2048():
    rope = tiny.AdaptiveRopeScaling(kind="adaptive", original_length=2048, coefficient=1.1)
    model = tiny.config(rope=rope, max_length=4096, head_dim=128)
    theta = [inverse_frequencies(model, n)[1] ** -64 for n in (2048, 2049, 4096)]
    np.testing.assert_allclose(theta[0], 1e4, rtol=1e-9)
    np.testing.assert_allclose(theta[1], 1e4 * ((2049 / 1024 - 1) * 1.1) ** (128 / 126), rtol=1e-9)
    np.testing.assert_allclose(theta[2], 1e4 * ((4096 / 1024 - 1) * 1.1) ** (128 / 126), rtol=1e-9)


def test_yarn_of_chinese_llama_2_64k():
    model = load_model("chinese-llama2-7b-64k")
    scaled, plain = inverse_frequencies(model), 1e4 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(scaled[:21], plain[:21], rtol=1e-14)
    np.testing.assert_allclose(scaled[46:], plain[46:] / 16, rtol=1e-14)
    assert (scaled[21:46] < plain[21:46]).all() and (scaled[21:46] > plain[21:46] / 16).all()
    assert attention_factor(model) == pytest.approx(1.277, abs=5e-4)


def test_yarn_scales_the_tables():
    rope = YarnRopeScaling(kind="yarn", factor=8.0, original_length=256, attention_factor=1.5)
    cos, sin = rope_tables(turns(tiny.config(rope=rope)), np.arange(300)[None])
    np.testing.assert_allclose(np.hypot(cos, sin), 1.5, rtol=1e-6)


def test_a_cache_needs_the_length_where_the_kind_does():
    model, compute = tiny.config(rope=tiny.DYNAMIC), tiny.compute()
    params, row = tiny.params(model), tiny.tokens(1, 4)
    with pytest.raises(ValueError, match="dynamic: with a cache, give `turns`"):
        cache = init_cache(model, compute, 1, 8)
        llama.apply(params, model, compute, row, np.arange(4)[None], cache=cache)
    with pytest.raises(ValueError, match="dynamic"):
        inverse_frequencies(model)


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


@pytest.mark.parametrize("name", ["llama1", "llama3.1", "linear-rope", "dynamic", "yarn"])
def test_tables_are_exact_at_any_position(name):
    model = tiny.config(**tiny.VARIANTS[name], head_dim=128)
    positions = np.array([[0, 1, 1999, 131_071, 10_000_019]])
    cos, sin = jax.jit(rope_tables)(turns(model, 777), positions)
    angles, scale = positions[0][:, None] * reference.frequencies(model, 777), 1.0
    if name == "yarn":
        scale = 0.1 * np.log(8) + 1
    np.testing.assert_allclose(cos[0, :, 0], scale * np.cos(angles), atol=1.3e-6)
    np.testing.assert_allclose(sin[0, :, 0], scale * np.sin(angles), atol=1.3e-6)


def test_scores_depend_on_the_distance_only():
    model = tiny.config()
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, model.head_dim)).astype(np.float32)

    def score(at, of):
        tables = [rope_tables(turns(model), np.array([[p]])) for p in (at, of)]
        return float((apply_rope(q, *tables[0]) * apply_rope(k, *tables[1])).sum())

    assert score(7, 3) == pytest.approx(score(1507, 1503), rel=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 2), rel=1e-2)
