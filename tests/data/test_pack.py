"""Rows predict every token once, separate documents, and fit them as by brute force."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllama.data.pack import CutRows, WholeRows, best_fit
from jllama.errors import UserError

LENGTHS = st.lists(st.integers(2, 20), min_size=1, max_size=40)


def memory(lengths):
    """A prepared dataset in memory, with documents of these lengths and distinct tokens."""
    ends = np.cumsum(lengths)
    tokens = np.arange(1, ends[-1] + 1, dtype=np.int32)
    starts = np.zeros(ends[-1], bool)
    starts[ends - lengths] = True
    return SimpleNamespace(
        name="memory",
        tokens=int(ends[-1]),
        read=lambda start, stop: (tokens[start:stop].copy(), starts[start:stop].copy()),
        document_ends=lambda: ends,
        number=lambda document: document + 1,
        lengths=lengths,
        starts=starts,
    )


def rows_of(rows):
    """Returns all rows, after checking what holds for each of them."""
    result = [rows[i] for i in range(len(rows))]
    for row in result:
        assert {k: (v.dtype, v.shape) for k, v in row.items()} == {
            "tokens": (np.int32, (rows.length + 1,)),
            "segments": (np.int32, (rows.length + 1,)),
            "weights": (np.float32, (rows.length + 1,)),
        }
        segments = row["segments"]
        used = np.count_nonzero(segments)
        assert used and segments[0] == 1  # no row is empty; padding only at the end
        assert not segments[used:].any() and not row["tokens"][used:].any()
        assert set(np.diff(segments[:used])) <= {0, 1}
        first = np.concatenate([[True], np.diff(segments) != 0])
        assert not row["weights"][first | (segments == 0)].any()
    return result


def predicted(rows):
    """Returns the tokens with weight, sorted."""
    return sorted(t for row in rows for t in row["tokens"][row["weights"] == 1].tolist())


@given(LENGTHS, st.integers(1, 30), st.data())
def test_cut_rows_predict_each_token_once_with_context(lengths, length, data):
    prepared = memory(lengths)
    stride = data.draw(st.integers(1, length))
    rows = rows_of(CutRows(prepared, length, stride))
    wanted = np.flatnonzero(~prepared.starts) + 1
    assert predicted(rows) == wanted.tolist()
    document = np.cumsum(prepared.starts)
    for row in rows:
        used = row["segments"] > 0
        # Positions share a segment if and only if they share a document.
        of = document[row["tokens"][used] - 1]
        assert (row["segments"][used] == of - of[0] + 1).all()
        for at in np.flatnonzero(row["weights"]):
            assert at >= min(length - stride, row["tokens"][at] - 1)


@given(LENGTHS, st.integers(1, 30))
def test_cut_rows_cover_the_stream_and_share_one_token(lengths, length):
    prepared = memory(lengths)
    rows = rows_of(CutRows(prepared, length))
    for i, row in enumerate(rows):
        n = min(length + 1, prepared.tokens - i * length)
        assert row["tokens"][:n].tolist() == list(range(i * length + 1, i * length + n + 1))
        assert np.count_nonzero(row["segments"]) == n


def test_a_cut_row_spelt_out():
    rows = CutRows(memory([3, 4]), 4)
    assert [{k: v.tolist() for k, v in rows[i].items()} for i in range(len(rows))] == [
        {"tokens": [1, 2, 3, 4, 5], "segments": [1, 1, 1, 2, 2], "weights": [0, 1, 1, 0, 1]},
        {"tokens": [5, 6, 7, 0, 0], "segments": [1, 1, 1, 0, 0], "weights": [0, 1, 1, 0, 0]},
    ]


@given(LENGTHS, st.integers(19, 40))
def test_whole_rows_hold_every_document_once(lengths, length):
    prepared = memory(lengths)
    rows = rows_of(WholeRows(prepared, length, "error"))
    assert predicted(rows) == (np.flatnonzero(~prepared.starts) + 1).tolist()
    documents = [
        row["tokens"][row["segments"] == segment].tolist()
        for row in rows
        for segment in range(1, row["segments"].max() + 1)
    ]
    ends = np.cumsum(lengths)
    wanted = [list(range(e - n + 1, e + 1)) for e, n in zip(ends.tolist(), lengths, strict=True)]
    assert sorted(documents) == wanted


def brute_force(lengths, capacity):
    rooms = []
    for n in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= n]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=capacity) - n)
    return sorted(rooms)


@given(st.lists(st.integers(1, 20), max_size=80), st.integers(20, 60))
def test_best_fit_is_best_fit_decreasing(lengths, capacity):
    row_of = best_fit(np.array(lengths, np.int64), capacity)
    used = np.bincount(row_of, weights=lengths).astype(int)
    assert sorted(capacity - used) == brute_force(lengths, capacity)


def test_a_million_documents_pack_in_seconds_and_well():
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 400, 1_000_000) + 1, 2049)
    began = time.process_time()
    row_of = best_fit(lengths, 2049)
    assert time.process_time() - began < 10
    assert lengths.sum() > 0.999 * 2049 * (row_of.max() + 1)


def test_too_long_documents_are_an_error_or_left_out_and_counted():
    prepared = memory([5, 12, 3])
    with pytest.raises(UserError, match=r"memory: document 2 has 12 tokens .* 11 .* skip or cut"):
        WholeRows(prepared, 10, "error")
    rows = WholeRows(prepared, 10, "skip")
    assert (len(rows), rows.too_long) == (1, 1)
    assert len(WholeRows(prepared, 11, "error")) == len(WholeRows(prepared, 10, "cut")) == 2
    assert len(WholeRows(memory([12]), 10, "skip")) == 0


def test_too_long_documents_are_cut_at_their_end():
    rows = WholeRows(memory([5, 12, 3]), 10, "cut")
    assert rows.too_long == 1
    held = {number: tokens.tolist() for number, tokens in rows.documents()}
    assert held == {1: [1, 2, 3, 4, 5], 2: list(range(6, 17)), 3: [18, 19, 20]}
    assert predicted(rows_of(rows)) == [*range(2, 6), *range(7, 17), 19, 20]


def test_strides_outside_the_row_and_rows_outside_are_errors():
    for stride in (0, 9):
        with pytest.raises(UserError, match=f"stride={stride}"):
            CutRows(memory([5]), 8, stride)
    rows = CutRows(memory([5, 5]), 8)
    assert rows[-1]["tokens"].tolist() == rows[1]["tokens"].tolist()
    with pytest.raises(IndexError):
        rows[2]


def test_another_length_prepares_nothing(prepare_texts, monkeypatch):
    prepared = prepare_texts()
    monkeypatch.setattr("jllama.data.prepare._make", None)
    for length in (5, 64, 1000):
        for make in (lambda n: CutRows(prepared, n), lambda n: WholeRows(prepared, n, "skip")):
            rows_of(make(length))
    assert prepare_texts().digest == prepared.digest
