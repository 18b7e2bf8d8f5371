"""Rows of one shape from prepared tokens: pure functions of (prepared data, length, row).

A row of length T has T + 1 positions:

    tokens    int32   [T+1]  0 where there is padding
    segments  int32   [T+1]  1, 2, ... numbers the documents in the row; 0 is padding
    weights   float32 [T+1]  weight of predicting this token from those before it in its segment

so the first token of a segment has weight 0, and so has position 0.
"""

from typing import Literal, Protocol

import numpy as np

from jllama.data.prepared import Prepared
from jllama.errors import UserError

Row = dict[str, np.ndarray]


class Rows(Protocol):
    """Random access to rows; safe from several threads."""

    length: int

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Row: ...


def empty_row(length: int) -> Row:
    """All padding."""
    return {
        "tokens": np.zeros(length + 1, np.int32),
        "segments": np.zeros(length + 1, np.int32),
        "weights": np.zeros(length + 1, np.float32),
    }


class CutRows:
    """Rows cut from the stream of all documents; a document continues in the next row.

    Neighbouring rows share one token, so each token that follows another of its document is
    predicted exactly once, by rows `stride` targets apart. With `stride` below `length` (for
    evaluation) a target has at least `length - stride` tokens before it, where the stream has them.
    """

    def __init__(self, prepared: Prepared, length: int, stride: int | None = None):
        """Raises UserError unless 1 <= stride <= length; `None` is `length`."""
        self.length = length
        self._stride = length if stride is None else stride
        self._prepared = prepared
        if not 1 <= self._stride <= length:
            raise UserError(f"stride={stride}: must be from 1 to the row's length, {length}")

    def __len__(self) -> int:
        return max(0, -(-(self._prepared.tokens - 1) // self._stride))

    def __getitem__(self, row: int) -> Row:
        row = _index(row, len(self))
        last = (row + 1) * self._stride  # stream position of the last target
        start = max(0, last - self.length)
        stop = min(start + self.length + 1, self._prepared.tokens)
        tokens, starts = self._prepared.read(start, stop)
        n = stop - start
        result = empty_row(self.length)
        result["tokens"][:n] = tokens
        starts[0] = True
        result["segments"][:n] = np.cumsum(starts)
        scored = ~starts
        scored[: last - self._stride + 1 - start] = False
        scored[last + 1 - start :] = False
        result["weights"][:n] = scored
        return result


class WholeRows:
    """Whole documents, several to a row by best fit; the rest of the row is padding.

    A document of n tokens, BOS and EOS in it, takes n of the T + 1 positions and n - 1 targets, so
    one of up to T + 1 tokens fits. Rows are made from lengths alone: best-fit decreasing, ties in
    the order of the stream. Keeps 24 bytes per document in memory.
    """

    def __init__(
        self,
        prepared: Prepared,
        length: int,
        too_long: Literal["error", "skip"],
        spare: int = 0,
    ):
        """Raises UserError for a document longer than a row, unless `too_long` is "skip".

        `spare` positions are kept free for each document, where the row has them.
        """
        self.length = length
        self._prepared = prepared
        ends = prepared.document_ends()
        starts = np.concatenate([[0], ends[:-1]])
        lengths = ends - starts
        fits = np.flatnonzero(lengths <= length + 1)
        self.too_long = len(lengths) - len(fits)
        """Documents left out because they are longer than a row."""
        if self.too_long and too_long == "error":
            first = int(np.argmax(lengths > length + 1))
            raise UserError(
                f"{prepared.folder}: document {first} has {lengths[first]} tokens and a row holds "
                f"{length + 1} ({self.too_long} documents are too long); raise data.length or set "
                "packing.too_long=skip"
            )
        row_of = best_fit(np.minimum(lengths[fits] + spare, length + 1), length + 1)
        order = np.argsort(row_of, kind="stable")
        self._first = np.searchsorted(row_of[order], np.arange(row_of.max(initial=-1) + 2))
        self._starts, self._ends = starts[fits][order], ends[fits][order]

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, row: int) -> Row:
        row = _index(row, len(self))
        result, at = empty_row(self.length), 0
        for segment, i in enumerate(range(self._first[row], self._first[row + 1]), start=1):
            tokens, _ = self._prepared.read(int(self._starts[i]), int(self._ends[i]))
            here = slice(at, at + len(tokens))
            result["tokens"][here] = tokens
            result["segments"][here] = segment
            result["weights"][at + 1 : here.stop] = 1
            at = here.stop
        return result


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each document by best-fit decreasing: int64 [documents].

    All lengths are within `capacity`. Works by (length, room left) classes, not document by
    document: among rows with the least sufficient room c, one takes c // length documents before
    any other row is a better fit, so whole classes move at once.
    """
    row_of = np.empty(len(lengths), np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    values, firsts = np.unique(-lengths[by_length], return_index=True)
    bounds = np.append(firsts, len(lengths))
    room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # rows by room left
    rooms = np.zeros(capacity + 1, bool)
    rows = 0

    def fill(some: np.ndarray, left: int, documents: np.ndarray, length: int) -> np.ndarray:
        """Puts documents into `some` rows, each with room `left`; returns what is over."""
        each = left // length
        used = min(len(some), -(-len(documents) // each))
        placed = min(len(documents), used * each)
        row_of[documents[:placed]] = np.repeat(some[:used], each)[:placed]
        full, partly = divmod(placed, each)
        put(some[:full], left - each * length)
        put(some[full:used], left - partly * length)
        put(some[used:], left)
        return documents[placed:]

    def put(some: np.ndarray, left: int) -> None:
        if len(some) and left:
            room[left].append(some)
            rooms[left] = True

    for i, negative in enumerate(values):
        length = int(-negative)
        documents = by_length[bounds[i] : bounds[i + 1]]
        for left in np.flatnonzero(rooms[length:]) + length:
            if not len(documents):
                break
            some = np.concatenate(room[left])
            room[left], rooms[left] = [], False
            documents = fill(some, int(left), documents, length)
        if len(documents):
            new = np.arange(rows, rows + -(-len(documents) // (capacity // length)))
            rows += len(new)
            fill(new, capacity, documents, length)
    return row_of


def _index(row: int, rows: int) -> int:
    row = int(row)
    if not -rows <= row < rows:
        raise IndexError(f"row {row} of {rows}")
    return row % rows
