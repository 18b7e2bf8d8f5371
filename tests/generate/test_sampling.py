"""Sampling rules against plain NumPy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jllama.errors import UserError
from jllama.generate.sampling import Sampling, keep_top_k, keep_top_p, penalise, sample, stack

V = 12
rows = st.lists(
    st.lists(st.floats(-20, 20, width=32), min_size=V, max_size=V, unique=True),
    min_size=2,
    max_size=2,
).map(lambda x: np.array(x, np.float32) + np.float32(0))
top_k, top_p, draw = jax.jit(keep_top_k), jax.jit(keep_top_p), jax.jit(sample)


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x))
    return e / e.sum()


def kept_by_top_k(logits, k):
    """Which tokens stay, by sorting."""
    order = np.argsort(-logits)
    return set(order[: k or V].tolist())


def kept_by_top_p(logits, p):
    """The fewest likeliest tokens that reach p, and how near to p that was decided."""
    order = np.argsort(-logits)
    total = np.cumsum(softmax(logits)[order])
    count = int(np.sum(total < p)) + 1
    return set(order[:count].tolist()), float(np.abs(total - p).min())


@hypothesis.given(rows, st.lists(st.integers(0, V + 3), min_size=2, max_size=2))
def test_top_k_keeps_the_k_largest(logits, ks):
    got = np.asarray(top_k(logits, np.array(ks, np.int32)))
    for row, k in enumerate(ks):
        kept = np.flatnonzero(np.isfinite(got[row])).tolist()
        assert set(kept) == kept_by_top_k(logits[row], k)
        np.testing.assert_array_equal(got[row, kept], logits[row, kept])


@hypothesis.given(rows, st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2))
def test_top_p_keeps_the_nucleus(logits, ps):
    got = np.asarray(top_p(logits, np.array(ps, np.float32)))
    for row, p in enumerate(ps):
        wanted, margin = kept_by_top_p(logits[row], p)
        kept = set(np.flatnonzero(np.isfinite(got[row])).tolist())
        if p == 1:
            assert kept == set(range(V))
        elif margin > 1e-5:  # nearer than that, float32 sums may decide otherwise
            assert kept == wanted


def test_top_p_of_zero_keeps_the_largest_and_of_one_keeps_all():
    logits = np.array([[3.0, 1.0, 2.0], [0.0, -60.0, -80.0]], np.float32)
    np.testing.assert_array_equal(np.isfinite(top_p(logits, np.zeros(2, np.float32)))[0], [1, 0, 0])
    assert np.isfinite(top_p(logits, np.ones(2, np.float32))).all()


def test_equal_logits_stand_or_fall_together():
    got = np.isfinite(top_k(np.array([[1.0, 2.0, 2.0, 0.0]], np.float32), np.array([1])))
    np.testing.assert_array_equal(got, [[False, True, True, False]])


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = np.array([[2.0, -2.0, 2.0, -2.0], [2.0, -2.0, 2.0, -2.0]], np.float32)
    seen = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool)
    got = penalise(logits, seen, np.array([4.0, 1.0], np.float32))
    np.testing.assert_array_equal(got, [[0.5, -8, 2, -2], [2, -2, 2, -2]])


def frequencies(logits, settings, seen=None, draws=20_000):
    """How often each token is drawn, from one key each."""
    logits = jnp.tile(jnp.asarray(logits, jnp.float32), (draws, 1))
    seen = jnp.zeros(logits.shape, bool) if seen is None else jnp.tile(seen, (draws, 1))
    keys = jax.random.split(jax.random.key(0), draws)
    many = functools.partial(jax.tree.map, lambda x: jnp.tile(x, draws))
    tokens = np.asarray(draw(keys, logits, seen, many(stack([settings]))))
    return np.bincount(tokens, minlength=logits.shape[1]) / draws


LOGITS = np.random.default_rng(0).normal(size=V).astype(np.float32) * 2


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, top_k=4),
        Sampling(temperature=1.5, top_p=0.7),
        Sampling(temperature=1.5, top_k=5, top_p=0.8),
        Sampling(temperature=2.0, repetition_penalty=3.0),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(settings):
    seen = np.arange(V) % 2 == 0
    logits = LOGITS.astype(np.float64)
    rule = settings.repetition_penalty
    logits = np.where(seen, np.where(logits > 0, logits / rule, logits * rule), logits)
    logits = logits / settings.temperature
    keep = kept_by_top_k(logits, settings.top_k)
    logits = np.where(np.isin(np.arange(V), list(keep)), logits, -np.inf)
    keep, _ = kept_by_top_p(logits, settings.top_p)
    wanted = softmax(np.where(np.isin(np.arange(V), list(keep)), logits, -np.inf))
    got = frequencies(LOGITS, settings, seen)
    assert (got[wanted == 0] == 0).all()
    assert np.abs(got - wanted).max() < 0.02  # over five standard deviations of 20,000 draws


def test_greedy_is_the_argmax_after_the_penalty():
    keys = jax.random.split(jax.random.key(0), 2)
    logits = np.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]], np.float32)
    seen = np.array([[0, 1, 0]] * 2, bool)
    settings = [Sampling(temperature=0), Sampling(temperature=0, repetition_penalty=2)]
    assert draw(keys, logits, seen, stack(settings)).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
def test_the_smallest_temperatures_are_greedy_and_finite(temperature):
    settings = Sampling(temperature=temperature, top_k=3, top_p=0.9)
    assert frequencies(LOGITS, settings, draws=50)[LOGITS.argmax()] == 1


def test_rows_of_one_batch_have_their_own_settings_and_nothing_recompiles():
    keys, seen = jax.random.split(jax.random.key(1), 3), np.zeros((3, V), bool)
    logits = np.tile(LOGITS, (3, 1))
    mixed = [Sampling(temperature=0), Sampling(temperature=5.0), Sampling(temperature=9.0, top_k=1)]
    first = draw(keys, logits, seen, stack(mixed))
    compiled = draw._cache_size()
    assert first[0] == first[2] == LOGITS.argmax()
    again = draw(keys, logits, seen, stack([mixed[1], mixed[1], Sampling(top_p=0.3)]))
    assert again[1] == first[1]
    assert draw._cache_size() == compiled


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 1.01},
        {"top_p": -0.1},
        {"repetition_penalty": 0.0},
    ],
    ids=str,
)
def test_impossible_settings_are_an_error_that_names_them(bad):
    with pytest.raises(UserError, match=f"^{next(iter(bad))}="):
        Sampling(**bad)
