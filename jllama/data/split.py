"""Splits the documents of sources into training and held-out ones, when they are read.

The side of a document is a function of its text alone: prepared data has both sides, with the hash
of each text, and another share prepares nothing anew.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from jllama.config import DataConfig, HeldOutShare, SourceConfig, TextSource
from jllama.data import source as sources
from jllama.data.prepared import Prepared
from jllama.data.worker import is_held_out, text_hash
from jllama.errors import UserError
from jllama.progress import say

Side = Literal["train", "held_out"]
_LARGEST = 100  # of the shares that an error proposes


class Selection:
    """Some documents of a prepared source: a stream of ids, read like that of `Prepared`.

    Takes a byte of host memory per document, and 16 for each run of consecutive ones.

    Attributes:
      name, folder, documents, tokens, bytes, digest: as those of `Prepared`.
    """

    def __init__(self, prepared: Prepared, table: np.ndarray, chosen: np.ndarray, label: str):
        """Takes the documents that are true in `chosen`: bool [documents], at least one.

        Args:
          table: that of `prepared.document_table()`.
          label: says which documents are chosen, for the digest.
        """
        self._prepared, self._chosen = prepared, chosen
        self.name, self.folder = prepared.name, prepared.folder
        self.documents = int(np.count_nonzero(chosen))
        self.tokens = int(table["tokens"][chosen].sum())
        self.bytes = int(table["bytes"][chosen].sum())
        self.digest = hashlib.sha256(f"{prepared.digest} {label}".encode()).hexdigest()
        # Runs of consecutive documents: where they begin, in the whole stream and in this one.
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).reshape(-1, 2)
        ends = np.concatenate([[0], np.cumsum(table["tokens"].astype(np.int64))])
        self._whole_starts = ends[edges[:, 0]]
        lengths = ends[edges[:, 1]] - self._whole_starts
        self._starts = np.concatenate([[0], np.cumsum(lengths)])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the positions [start, stop) of this stream, as `Prepared.read` does."""
        tokens, starts = np.empty(stop - start, np.int32), np.empty(stop - start, bool)
        at, run = start, int(np.searchsorted(self._starts, start, side="right")) - 1
        while at < stop:
            end = min(stop, int(self._starts[run + 1]))
            shift = int(self._whole_starts[run] - self._starts[run])
            part = slice(at - start, end - start)
            tokens[part], starts[part] = self._prepared.read(at + shift, end + shift)
            at, run = end, run + 1
        return tokens, starts

    def document_ends(self) -> np.ndarray:
        """Returns the position in this stream after each document: int64 [documents]."""
        return np.cumsum(np.diff(self._prepared.document_ends(), prepend=0)[self._chosen])

    def number(self, document: int) -> int:
        """Returns the number in the source of a document of this stream, as `Prepared.number`."""
        return self._prepared.number(int(np.flatnonzero(self._chosen)[document]))


TokenStream = Prepared | Selection


def split(prepared: Prepared, source: SourceConfig, share: HeldOutShare) -> dict[Side, Selection]:
    """Returns the training and the held-out documents of a source; says how many there are.

    Raises UserError if all documents are on one side.
    """
    table = prepared.document_table()
    held_out = is_held_out(table["hash"], share.one_in)
    if held_out.all() or not held_out.any():
        raise _one_sided(source, table["hash"], share)
    label = f"one in {share.one_in}"
    sides: dict[Side, Selection] = {
        "train": Selection(prepared, table, ~held_out, f"without {label}"),
        "held_out": Selection(prepared, table, held_out, label),
    }
    counts = [f"{s.documents:,} documents, {s.bytes:,} bytes" for s in sides.values()]
    say(f"source {source.name}: {counts[0]} for training; {counts[1]} held out")
    return sides


def _one_sided(source: SourceConfig, hashes: np.ndarray, share: HeldOutShare) -> UserError:
    distinct = np.unique(hashes)
    missing = "left to train on" if is_held_out(distinct, share.one_in).all() else "to hold out"
    nearest = sorted(range(2, _LARGEST + 1), key=lambda n: abs(n - share.one_in))
    other = next((n for n in nearest if len(np.unique(is_held_out(distinct, n))) == 2), None)
    fixes = [f"set one_in to {other}"] if other else []
    if isinstance(source.source, TextSource):
        change = "set" if source.source.separator is None else "correct"
        fixes.append(f'{change} its separator, such as "\\n\\n", which cuts a file into documents')
    return UserError(
        f"data.held_out.one_in={share.one_in}: source {source.name} has no document {missing}"
        f" (different documents in it: {len(distinct):,});"
        f" {', or '.join(fixes) or 'give it more documents'}"
    )


def sources_of(data: DataConfig, side: Side) -> tuple[SourceConfig, ...]:
    """Returns the sources that have the documents of a side."""
    shared = side == "train" or isinstance(data.held_out, HeldOutShare)
    return data.train if shared else data.held_out


def texts_of(
    data: DataConfig, side: Side, source: SourceConfig, report: Callable[[str], None] = say
) -> Iterator[str]:
    """Yields the texts of a source that are on a side; `report` is that of `sources.documents`.

    Raises UserError if a share leaves the side without any.
    """
    share = data.held_out if isinstance(data.held_out, HeldOutShare) else None
    yielded, others = False, set()
    for document in sources.documents(
        source.source, max_skipped=data.prepare.max_skipped, report=report
    ):
        number = text_hash(document.text)
        if share is None or is_held_out(number, share.one_in) == (side == "held_out"):
            yielded = True
            yield document.text
        elif not yielded:
            others.add(number)
    if share is not None and not yielded:
        raise _one_sided(source, np.array(sorted(others), np.uint64), share)
