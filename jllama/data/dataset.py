"""Batches as a pure function of (prepared data, seed, step): shuffled, mixed, prefetched.

Grain's random-access datasets do the work. Each source is an endless list of its rows, shuffled
anew in every epoch, and the mixture takes rows from the sources by weight. There is no iterator
state to save: batch `t` is rows `t * B` to `t * B + B` of the mixture, whoever asks, whenever.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import numpy as np

from jllama.data.pack import Row, Rows, empty_row
from jllama.data.rewrite import Rewriting
from jllama.errors import UserError

# Arrays in host memory: tokens int32, segments int32, weights float32; each [B, T+1].
HostBatch = dict[str, np.ndarray]

_FOREVER = 1 << 40  # steps


class Dataset:
    """Training batches from one or several sources."""

    def __init__(
        self,
        rows: Mapping[str, Rows],
        weights: Mapping[str, float],
        batch_size: int,
        seed: int,
        objective: Rewriting | None = None,
    ):
        """Mixes the rows of each source in proportion to its weight.

        Args:
          rows, weights: by the source's name; a source's share of the rows is its weight over the
            sum of all weights.
          objective: rewrites each row for the epoch of its source.

        Raises UserError for a source without rows.
        """
        for name, source_rows in rows.items():
            if not len(source_rows):
                raise UserError(f"source {name}: has no rows")
        self.rows = dict(rows)
        self.batch_size = batch_size
        self.objective = objective
        # The order within a source depends on its name, so that adding a source keeps the others'.
        parts = []
        for name, source_rows in rows.items():
            part = grain.MapDataset.source(source_rows).seed(_seed(seed, name)).shuffle().repeat()
            if objective is not None:
                part = part.map_with_index(_each_epoch(objective, len(source_rows)))
            parts.append(part)
        total = sum(weights[name] for name in rows)
        self._mixture = grain.MapDataset.mix(parts, [weights[name] / total for name in rows])

    def batch(self, step: int, rows: Sequence[int] | None = None) -> HostBatch:
        """Returns the batch of `step` (from 0).

        A process of several names in `rows` the rows of the batch that it needs; no others are
        read.
        """
        first = step * self.batch_size
        rows = range(self.batch_size) if rows is None else rows
        return _stack([self._mixture[first + i] for i in rows])

    def iterate(
        self, start: int = 0, rows: Sequence[int] | None = None, prefetch: int = 4
    ) -> Iterator[tuple[int, HostBatch]]:
        """Yields (step, batch(step, rows)) from `start` on; threads read `prefetch` ahead."""
        steps = grain.MapDataset.range(start, _FOREVER).map(lambda t: (int(t), self.batch(t, rows)))
        threads = min(prefetch, 4)
        return iter(
            steps.to_iter_dataset(
                grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
            )
        )


def _each_epoch(objective: Rewriting, num_rows: int) -> Callable[[int, Row], Row]:
    # The index in a repeated dataset keeps counting through the epochs.
    return lambda index, row: objective(row, index // num_rows)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def _stack(rows: Sequence[Row]) -> HostBatch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def eval_batches(
    rows: Rows,
    length: int,
    batch_size: int,
    max_rows: int = 0,
    part: Sequence[int] | None = None,
) -> Iterator[HostBatch]:
    """Yields every row of `length` once, in order, or the first `max_rows` rows if that is not 0.

    Rows of padding, which have no weight, fill up the last batch. A process of several names in
    `part` the rows of each batch that it needs.
    """
    count = min(len(rows), max_rows or len(rows))
    part = range(batch_size) if part is None else part
    for first in range(0, count, batch_size):
        indices = [first + i for i in part]
        yield _stack([rows[i] if i < count else empty_row(length) for i in indices])
