"""Opens what a recipe names: its tokenizer, loaded or trained, and the rows of its sources."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import TypeVar

import grain

from jllama.config import (
    Config,
    DataConfig,
    InfillObjective,
    SourceConfig,
    TfdsSource,
    TokenizerFile,
    TrainedTokenizer,
    WholePacking,
)
from jllama.config.recipe import to_dict
from jllama.data import source as sources
from jllama.data.dataset import Dataset
from jllama.data.pack import CutRows, Rows, WholeRows
from jllama.data.prepare import prepare
from jllama.data.prepared import Prepared
from jllama.data.rewrite import Replies, rewriting
from jllama.data.text_files import NoFiles
from jllama.errors import UserError
from jllama.files import storage
from jllama.files.locks import locked
from jllama.progress import say
from jllama.text.infill import infill_tokens
from jllama.text.tokenizer import Tokenizer, load_tokenizer
from jllama.text.vocabulary import train_sentencepiece

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Data:
    """The opened data of a recipe: training batches, and prepared sources and rows by name.

    Attributes:
      held_out_rows: under the objective `reply` only the replies in them have weight; under any
        other they are ordinary text.
    """

    train: Dataset
    sources: dict[str, Prepared]
    held_out: dict[str, Prepared]
    held_out_rows: dict[str, Rows]


def open_data(config: Config, tokenizer: Tokenizer) -> Data:
    """Prepares the sources that are not prepared yet, and packs them into rows.

    Raises UserError for sources that cannot be read and for a tokenizer with more ids than the
    model has.
    """
    data = config.data
    if tokenizer.text_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer has"
            f" {tokenizer.vocab_size} pieces; raise model.vocab_size to that number"
        )
    for group, group_sources in (("train", data.train), ("held_out", data.held_out)):
        names = [s.name for s in group_sources]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise UserError(f"data.{group}: two sources are named {min(twice)}; rename one")
    objective = rewriting(data.objective, tokenizer, config.run.seed)
    if (
        isinstance(data.objective, InfillObjective)
        and max(infill_tokens(tokenizer)) >= config.model.vocab_size
    ):
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}: no rows for the tokenizer's infill"
            " tokens; raise it, or train with another objective"
        )
    if objective and not tokenizer.adds_bos and data.packing.kind != "whole":
        raise UserError(
            f"data.objective.kind={data.objective.kind}: needs data.packing.kind=whole, because the"
            " tokenizer adds no BOS, which would show where a document begins"
        )
    train = _each_source(data, "train", lambda s: prepare(s, tokenizer, data.prepare))
    held_out = _each_source(data, "held_out", lambda s: prepare(s, tokenizer, data.prepare))
    gain = objective.gain if objective else 0
    rows = {name: _pack(prepared, data, gain) for name, prepared in train.items()}
    held_out_gain = gain if isinstance(objective, Replies) else 0
    held_out_rows = {name: _pack(p, data, held_out_gain) for name, p in held_out.items()}
    if isinstance(objective, Replies):
        for name, source_rows in rows.items():
            objective.check(name, source_rows)
        # A second objective, whose counts stay out of the report on training.
        other = functools.partial(rewriting(data.objective, tokenizer, config.run.seed), epoch=0)
        held_out_rows = {
            name: grain.MapDataset.source(r).map(other) for name, r in held_out_rows.items()
        }
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


def _pack(prepared: Prepared, data: DataConfig, spare: int) -> Rows:
    if not isinstance(data.packing, WholePacking):
        return CutRows(prepared, data.length)
    rows = WholeRows(prepared, data.length, data.packing.too_long, spare)
    if rows.too_long:
        say(
            f"source {prepared.name}: {rows.too_long} of {prepared.documents} documents are longer"
            f" than a row of {data.length + 1} tokens and are left out"
        )
    return rows


def _each_source(
    data: DataConfig, group: str, action: Callable[[SourceConfig], _Result]
) -> dict[str, _Result]:
    """Calls `action` with each source of `train` or `held_out`; returns the results by name.

    If a source has no files, the UserError names its key in the recipe.
    """
    results = {}
    for i, source in enumerate(getattr(data, group)):
        try:
            results[source.name] = action(source)
        except NoFiles as e:
            raise UserError(f"data.{group}.{i}.source.files: {e}") from None
    return results


def open_tokenizer(config: Config) -> Tokenizer:
    """Returns the recipe's tokenizer: loaded, or trained once on the training sources.

    A trained tokenizer is stored beside the prepared data, under a name that is made from the
    configs it depends on. If the text changes later the tokenizer stays, and `prepare` reports the
    change.
    """
    match config.tokenizer:
        case TokenizerFile(path=path):
            try:
                return load_tokenizer(path)
            except UserError as e:
                raise UserError(
                    f"tokenizer.path: {e} (jllama ships no tokenizers: take the one that comes with"
                    " a model's weights, such as Llama's tokenizer.model, or set"
                    " tokenizer.kind=train to train one)"
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
            for group in ("train", "held_out"):  # a wrong path is known before minutes of work
                _each_source(data, group, _check_files)
            say(f"tokenizer: training {wanted.vocab_size} pieces")
            trained = train_sentencepiece(_training_texts(data, wanted.max_bytes), wanted)
            storage.write_bytes(path, trained.model)
    return load_tokenizer(path)


def _check_files(source: SourceConfig) -> None:
    if not isinstance(source.source, TfdsSource):  # may have to be downloaded first
        sources.source_files(source.source)


def _training_texts(data: DataConfig, max_bytes: int) -> Iterator[str]:
    """Yields the texts of the training sources, each up to its share of `max_bytes`."""
    total = sum(s.weight for s in data.train)
    for source in data.train:
        left = int(max_bytes * source.weight / total)
        # Skipped documents are reported when the source is prepared.
        for document in sources.documents(
            source.source, max_skipped=data.prepare.max_skipped, report=lambda line: None
        ):
            yield document.text
            left -= len(document.text.encode())
            if left <= 0:
                break
