"""Padding, other segments and later tokens never change a result."""

import numpy as np
import pytest
import tiny

CASES = ["llama1", "llama3.1", "qk-norm"]


@pytest.fixture(params=CASES)
def model(request):
    return tiny.config(**tiny.VARIANTS[request.param])


def test_other_segments_of_a_row_change_nothing(model):
    params, tokens = tiny.params(model, 5.0), tiny.tokens(1, 24)
    segments = np.repeat([[1, 2, 3]], [7, 9, 8], axis=1)
    other = np.where(segments == 2, tokens, tiny.tokens(1, 24, seed=1))
    a, b = (tiny.logits(params, model, t, segments=segments) for t in (tokens, other))
    np.testing.assert_array_equal(a[segments == 2], b[segments == 2])
    assert np.abs(a[segments != 2] - b[segments != 2]).max() > 1e-3


def test_a_segment_in_a_row_equals_it_alone(model):
    params, tokens = tiny.params(model, 5.0), tiny.tokens(1, 24)
    segments = np.repeat([[1, 2, 3]], [7, 9, 8], axis=1)
    row = tiny.logits(params, model, tokens, segments=segments)
    alone = tiny.logits(params, model, tokens[:, 7:16])
    assert tiny.relative_error(row[:, 7:16], alone) < 1e-6
    # Restarting the positions is the same thing: only distances count.
    restarted = np.concatenate([np.arange(7), np.arange(9), np.arange(8)])[None]
    again = tiny.logits(params, model, tokens, restarted, segments)
    assert tiny.relative_error(again, row) < 1e-6


def test_right_padding_changes_nothing(model):
    params, tokens = tiny.params(model, 5.0), tiny.tokens(2, 24)
    segments = np.repeat([[1, 0]], [15, 9], axis=1).repeat(2, axis=0)
    padded = np.where(segments == 1, tokens, 0)
    a, b = (tiny.logits(params, model, t, segments=segments) for t in (tokens, padded))
    np.testing.assert_array_equal(a[:, :15], b[:, :15])
    assert tiny.relative_error(b[:, :15], tiny.logits(params, model, tokens[:, :15])) < 1e-6
    assert np.isfinite(b).all()


def test_later_tokens_change_nothing(model):
    params, tokens = tiny.params(model, 5.0), tiny.tokens(1, 24)
    other = np.where(np.arange(24) < 10, tokens, tiny.tokens(1, 24, seed=1))
    a, b = (tiny.logits(params, model, t) for t in (tokens, other))
    np.testing.assert_array_equal(a[:, :10], b[:, :10])
    assert (a[:, 10:] != b[:, 10:]).any()


def test_other_rows_change_nothing(model):
    params, tokens = tiny.params(model, 5.0), tiny.tokens(3, 16)
    other = np.concatenate([tokens[:1], tiny.tokens(2, 16, seed=1)])
    a, b = (tiny.logits(params, model, t) for t in (tokens, other))
    np.testing.assert_array_equal(a[0], b[0])
