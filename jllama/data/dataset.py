"""Batches as a pure function of (prepared data, seed, step): shuffled, mixed, prefetched.

Grain's random-access datasets do it: each source is an endless list of its rows, shuffled anew
each epoch, and the mixture picks from them by weight. There is no iterator state to save: batch
`t` is rows `t * B` to `t * B + B` of the mixture, whoever asks, whenever.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import grain
import numpy as np

from jllama.config import (
    Config,
    DataConfig,
    SourceConfig,
    TfdsSource,
    TokenizerFile,
    TrainedTokenizer,
    WholePacking,
)
from jllama.config.recipe import to_dict
from jllama.data import source as sources
from jllama.data.files import NoFiles
from jllama.data.pack import CutRows, Row, Rows, WholeRows, empty_row
from jllama.data.prepare import prepare
from jllama.data.prepared import Prepared
from jllama.data.rewrite import Replies, Rewriting, rewriting
from jllama.errors import UserError
from jllama.files import storage
from jllama.files.locks import locked
from jllama.progress import say
from jllama.text.tokenizer import Tokenizer, load_tokenizer
from jllama.text.vocabulary import train_sentencepiece

Batch = dict[str, np.ndarray]  # tokens int32, segments int32, weights float32; each [B, T+1]

_Result = TypeVar("_Result")

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
        """`rows` and `weights` by source name; shares are weights over their sum, in rows.

        `objective` makes of each row, and of the epoch of its source, what is trained on. Raises
        UserError for a source without rows.
        """
        for name, some in rows.items():
            if not len(some):
                raise UserError(f"source {name}: has no rows; give it more text")
        self.rows = dict(rows)
        self.batch_size = batch_size
        self.objective = objective
        # A source's order depends on its name, so adding another leaves it as it is.
        parts = []
        for name, some in rows.items():
            part = grain.MapDataset.source(some).seed(_seed(seed, name)).shuffle().repeat()
            if objective is not None:
                part = part.map_with_index(_each_epoch(objective, len(some)))
            parts.append(part)
        total = sum(weights[name] for name in rows)
        self._mixture = grain.MapDataset.mix(parts, [weights[name] / total for name in rows])

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """Batch of `step` (from 0); `rows` are those to read, for one of several processes."""
        first = step * self.batch_size
        rows = range(self.batch_size) if rows is None else rows
        return stack([self._mixture[first + i] for i in rows])

    def iterate(
        self, start: int = 0, rows: Sequence[int] | None = None, prefetch: int = 4
    ) -> Iterator[tuple[int, Batch]]:
        """(step, batch(step, rows)) from `start` on, `prefetch` batches ahead in threads."""
        steps = grain.MapDataset.range(start, _FOREVER).map(lambda t: (int(t), self.batch(t, rows)))
        threads = min(prefetch, 4)
        return iter(
            steps.to_iter_dataset(
                grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
            )
        )


def _each_epoch(objective: Rewriting, rows: int) -> Callable[[int, Row], Row]:
    # A repeated dataset's index goes on through its epochs.
    return lambda index, row: objective(row, index // rows)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def stack(rows: Sequence[Row]) -> Batch:
    """Rows as one batch."""
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def eval_batches(
    rows: Rows, batch_size: int, max_rows: int = 0, part: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Every row once, in order (the first `max_rows` if that is not 0).

    The last batch is filled up with rows of padding, which weigh nothing. `part` are the rows of
    each batch to read, for one of several processes.
    """
    count = min(len(rows), max_rows or len(rows))
    part = range(batch_size) if part is None else part
    for first in range(0, count, batch_size):
        wanted = [first + i for i in part]
        yield stack([rows[i] if i < count else empty_row(rows.length) for i in wanted])


@dataclasses.dataclass(frozen=True)
class _Rewritten:
    """Rows as an objective makes them; always those of its first epoch."""

    rows: Rows
    objective: Rewriting

    @property
    def length(self) -> int:
        return self.rows.length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Row:
        return self.objective(self.rows[row], 0)


def cut(prepared: Prepared, data: DataConfig, spare: int = 0) -> Rows:
    """Rows of a source as `data` packs them; `spare` as `WholeRows` has it."""
    if isinstance(data.packing, WholePacking):
        rows = WholeRows(prepared, data.length, data.packing.too_long, spare)
        if rows.too_long:
            say(
                f"source {prepared.name}: {rows.too_long} of {prepared.documents} documents are "
                f"longer than a row of {data.length + 1} tokens and left out"
            )
        return rows
    return CutRows(prepared, data.length)


@dataclasses.dataclass(frozen=True)
class Data:
    """What `open_data` gives: training batches, and the prepared sources by name.

    Attributes:
      held_out_rows: under the objective `reply` replies alone weigh in them; else they are ordinary
        text, whatever is trained on.
    """

    train: Dataset
    sources: dict[str, Prepared]
    held_out: dict[str, Prepared]
    held_out_rows: dict[str, Rows]


def open_data(config: Config, tokenizer: Tokenizer) -> Data:
    """Prepares what is not prepared yet, and cuts rows. Raises UserError for bad sources."""
    data = config.data
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer has "
            f"{tokenizer.vocab_size} pieces; raise it to that"
        )
    for group, some in (("train", data.train), ("held_out", data.held_out)):
        names = [s.name for s in some]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise UserError(f"data.{group}: two sources are named {min(twice)}; rename one")
    objective = rewriting(data.objective, tokenizer, config.run.seed)
    train = _each(data, "train", lambda s: prepare(s, tokenizer, data.prepare))
    held_out = _each(data, "held_out", lambda s: prepare(s, tokenizer, data.prepare))
    rows = {name: cut(p, data, objective.gain if objective else 0) for name, p in train.items()}
    spare = objective.gain if isinstance(objective, Replies) else 0
    held_out_rows = {name: cut(p, data, spare) for name, p in held_out.items()}
    if isinstance(objective, Replies):
        for name, some in rows.items():
            objective.check(name, some)
        # Another one: what it counts is no part of the training's report.
        other = rewriting(data.objective, tokenizer, config.run.seed)
        held_out_rows = {name: _Rewritten(some, other) for name, some in held_out_rows.items()}
    return Data(
        train=Dataset(
            rows,
            {s.name: s.weight for s in data.train},
            config.training.batch_size,
            config.run.seed,
            objective,
        ),
        sources=train,
        held_out=held_out,
        held_out_rows=held_out_rows,
    )


def _each(
    data: DataConfig, part: str, action: Callable[[SourceConfig], _Result]
) -> dict[str, _Result]:
    """`action` of each source, by name; for a source without files, a UserError with its key."""
    results = {}
    for i, source in enumerate(getattr(data, part)):
        try:
            results[source.name] = action(source)
        except NoFiles as e:
            raise UserError(f"data.{part}.{i}.source.files: {e}") from None
    return results


def _check_files(source: SourceConfig) -> None:
    if not isinstance(source.source, TfdsSource):  # which may have to be downloaded first
        sources.source_files(source.source)


def open_tokenizer(config: Config) -> Tokenizer:
    """The recipe's tokenizer: loaded, or trained once on the training sources.

    A trained one is kept beside the prepared data, under a name made from the configs it depends
    on. If the text behind them changes later it stays as it is, and `prepare` reports the change.
    """
    match config.tokenizer:
        case TokenizerFile(path=path):
            try:
                return load_tokenizer(path)
            except UserError as e:
                raise UserError(
                    f"tokenizer.path: {e} (tokenizers are not part of jllama: they come with a"
                    " model's weights, as Llama's tokenizer.model; tokenizer.kind=train makes one)"
                ) from None
        case TrainedTokenizer() as wanted:
            return _trained(wanted, config.data)


def _trained(wanted: TrainedTokenizer, data: DataConfig) -> Tokenizer:
    key = [
        to_dict(wanted),
        [(to_dict(s), sources.version(s.source)) for s in data.train],
    ]
    identity = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = storage.path(data.prepare.folder)
    path = folder / f"tokenizer-{identity[:16]}.model"
    with locked(folder, ".tokenizer.lock"):
        if not storage.exists(path):
            for part in ("train", "held_out"):  # a wrong path is known before minutes of work
                _each(data, part, _check_files)
            say(f"tokenizer: training {wanted.vocab_size} pieces")
            trained = train_sentencepiece(_texts(data, wanted.max_bytes), wanted)
            storage.write_bytes(path, trained.model)
    return load_tokenizer(path)


def _texts(data: DataConfig, max_bytes: int) -> Iterable[str]:
    """Text of the training sources, each up to its share of `max_bytes`."""
    total = sum(s.weight for s in data.train)
    for source in data.train:
        yield from _first(source, int(max_bytes * source.weight / total), data.prepare.max_skipped)


def _first(source: SourceConfig, most: int, max_skipped: int) -> Iterator[str]:
    # Skipped documents are reported when the source is prepared.
    for document in sources.documents(
        source.source, max_skipped=max_skipped, report=lambda line: None
    ):
        yield document.text
        most -= len(document.text.encode())
        if most <= 0:
            return
