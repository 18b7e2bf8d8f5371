"""Training batches as arrays on the mesh."""

from collections.abc import Iterator

from jllama.config import Config
from jllama.data.opening import Data
from jllama.parallel.sharding import Placement
from jllama.train.loss import Batch


class Batches:
    """The training batches of a run, on the mesh: `batches(t)` depends on (data, seed, t) alone.

    A batch of B rows of length T is {"tokens": int32, "segments": int32, "weights": float32}, each
    [B, T+1] and spread as the sharding rules place the axis "batch"; `jllama.data.pack` says what
    a row holds. Every process calls this for the same steps, and reads the rows that its own
    devices hold.
    """

    def __init__(self, config: Config, data: Data, placement: Placement):
        self._dataset, self._placement = data.train, placement
        self._size, self._prefetch = config.training.batch_size, config.data.prefetch
        self._rows = placement.batch_rows(self._size, "training.batch_size")

    def __call__(self, step: int) -> Batch:
        """The batch of `step`, counted from 0: read now, and placed."""
        return self._placement.put_batch(self._dataset.batch(step, self._rows), self._size)

    def iterate(self, start: int = 0) -> Iterator[tuple[int, Batch]]:
        """(step, batch of that step) from `start` on, without end.

        Threads read `data.prefetch` batches ahead; a batch is placed when it is asked for.
        """
        read_ahead = self._dataset.iterate(start, self._rows, self._prefetch)
        return ((t, self._placement.put_batch(rows, self._size)) for t, rows in read_ahead)
