"""Packs prepared tokens into rows of one shape: pure functions of (prepared data, length, row).

A row of length T has T + 1 positions:

    tokens    int32   [T+1]  token ids; 0 in the padding
    segments  int32   [T+1]  the document's number in the row, from 1; 0 in the padding
    weights   float32 [T+1]  weight of predicting this token from the earlier ones of its segment

The first token of a segment has weight 0, and position 0 always is one.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from jllama.data.split import TokenStream
from jllama.errors import UserError

Row = dict[str, np.ndarray]
Rows = Sequence[Row]  # several threads may read it at once


def empty_row(length: int) -> Row:
    """Returns a row of padding."""
    return {
        "tokens": np.zeros(length + 1, np.int32),
        "segments": np.zeros(length + 1, np.int32),
        "weights": np.zeros(length + 1, np.float32),
    }


class CutRows:
    """Rows cut from the stream of all documents; a document continues in the next row.

    Neighbouring rows share one token, so that every token but the first of its document is
    predicted exactly once. A row has `stride` targets. With `stride` below `length` (for
    evaluation) at least `length - stride` tokens come before each target, if the stream has them.
    """

    def __init__(self, stream: TokenStream, length: int, stride: int | None = None):
        """Raises UserError unless 1 <= stride <= length. A stride of None means `length`."""
        self.length = length
        self._stride = length if stride is None else stride
        self._stream = stream
        if not 1 <= self._stride <= length:
            raise UserError(f"stride={stride}: must be from 1 to the row's length, {length}")

    def __len__(self) -> int:
        return max(0, -(-(self._stream.tokens - 1) // self._stride))

    def __getitem__(self, row: int) -> Row:
        row = range(len(self))[row]
        last = (row + 1) * self._stride  # stream position of the last target
        start = max(0, last - self.length)
        stop = min(start + self.length + 1, self._stream.tokens)
        tokens, starts = self._stream.read(start, stop)
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
    """Rows of whole documents, several to a row; padding fills the rest.

    A document of n tokens, counting BOS and EOS, takes n of the T + 1 positions and has n - 1
    targets, so a document of up to T + 1 tokens fits. The rows follow from the lengths alone:
    best-fit decreasing, with ties in the order of the stream. Takes 32 bytes of host memory per
    document.

    Attributes:
      too_long: number of documents longer than a row, which are left out or lose their end.
    """

    def __init__(
        self,
        stream: TokenStream,
        length: int,
        too_long: Literal["error", "skip", "cut"],
        spare: int = 0,
    ):
        """Raises UserError for a document longer than a row if `too_long` is "error".

        With "skip" it is left out, and with "cut" the row holds its first T + 1 tokens.

        The row leaves `spare` positions free for each document, if it has that many.
        """
        self.length = length
        self._stream = stream
        ends = stream.document_ends()
        starts = np.concatenate([[0], ends[:-1]])
        lengths = ends - starts
        self.too_long = int(np.count_nonzero(lengths > length + 1))
        if self.too_long and too_long == "error":
            first = int(np.argmax(lengths > length + 1))
            raise UserError(
                f"source {stream.name}: document {stream.number(first)} has {lengths[first]} tokens"
                f" and a row holds {length + 1} ({self.too_long} documents are too long); raise"
                " data.length, or set data.packing.too_long to skip or cut"
            )
        if too_long == "cut":
            lengths = np.minimum(lengths, length + 1)
        fits = np.flatnonzero(lengths <= length + 1)
        row_of = best_fit(np.minimum(lengths[fits] + spare, length + 1), length + 1)
        order = np.argsort(row_of, kind="stable")
        self._first = np.searchsorted(row_of[order], np.arange(row_of.max(initial=-1) + 2))
        self._documents = fits[order]
        self._starts, self._lengths = starts[fits][order], lengths[fits][order]

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, row: int) -> Row:
        row = range(len(self))[row]
        result, at = empty_row(self.length), 0
        for segment, i in enumerate(range(self._first[row], self._first[row + 1]), start=1):
            tokens = self._read(i)
            end = at + len(tokens)
            result["tokens"][at:end] = tokens
            result["segments"][at:end] = segment
            result["weights"][at + 1 : end] = 1
            at = end
        return result

    def _read(self, i: int) -> np.ndarray:
        start = int(self._starts[i])
        return self._stream.read(start, start + int(self._lengths[i]))[0]

    def documents(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number in the source, tokens) of each document in the rows."""
        for i in np.argsort(self._documents):
            yield self._stream.number(int(self._documents[i])), self._read(i)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the row of each document by best-fit decreasing: int64 [documents].

    No length is above `capacity`. Documents of one length and rows with the same room left are
    placed together: of the rows with the least sufficient room c, each takes c // length documents
    before any other row fits better.
    """
    row_of = np.empty(len(lengths), np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    values, firsts = np.unique(-lengths[by_length], return_index=True)
    bounds = np.append(firsts, len(lengths))
    rows_by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
    has_rows = np.zeros(capacity + 1, bool)
    num_rows = 0

    def fill(rows: np.ndarray, room: int, documents: np.ndarray, length: int) -> np.ndarray:
        """Places documents into rows with `room` each; returns the documents that are left."""
        each = room // length
        used = min(len(rows), -(-len(documents) // each))
        placed = min(len(documents), used * each)
        row_of[documents[:placed]] = np.repeat(rows[:used], each)[:placed]
        full, partly = divmod(placed, each)
        offer(rows[:full], room - each * length)
        offer(rows[full:used], room - partly * length)
        offer(rows[used:], room)
        return documents[placed:]

    def offer(rows: np.ndarray, room: int) -> None:
        if len(rows) and room:
            rows_by_room[room].append(rows)
            has_rows[room] = True

    for i, negative in enumerate(values):
        length = int(-negative)
        documents = by_length[bounds[i] : bounds[i + 1]]
        for room in np.flatnonzero(has_rows[length:]) + length:
            if not len(documents):
                break
            rows = np.concatenate(rows_by_room[room])
            rows_by_room[room], has_rows[room] = [], False
            documents = fill(rows, int(room), documents, length)
        if len(documents):
            new = np.arange(num_rows, num_rows + -(-len(documents) // (capacity // length)))
            num_rows += len(new)
            fill(new, capacity, documents, length)
    return row_of
