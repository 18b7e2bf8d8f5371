"""Opens what a recipe names: its tokenizer, loaded or trained, and the rows of its sources."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import TypeVar

import grain
import numpy as np

from jllama.config import (
    Config,
    DataConfig,
    HeldOutShare,
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
from jllama.data.rewrite import Replies, rewriting
from jllama.data.split import Side, TokenStream, sources_of, split, texts_of
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
    sources: dict[str, TokenStream]
    held_out: dict[str, TokenStream]
    held_out_rows: dict[str, Rows]


def open_data(config: Config, tokenizer: Tokenizer) -> Data:
    """Prepares the sources that are not prepared yet, and packs them into rows.

    Raises UserError for sources that cannot be read or of which no document is on one side, for
    documents that the recipe refuses, and for a tokenizer with more ids than the model has.
    """
    data = config.data
    if tokenizer.text_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer has"
            f" {tokenizer.vocab_size} pieces; raise model.vocab_size to that number"
        )
    for side in ("train", "held_out"):
        names = [s.name for s in sources_of(data, side)]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise UserError(f"data.{side}: two sources are named {min(twice)}; rename one")
    objective = rewriting(data.objective, tokenizer, config.run.seed)
    if isinstance(data.objective, InfillObjective):
        rows = 1 + max(infill_tokens(tokenizer))
        if rows > config.model.vocab_size:
            raise UserError(
                f"model.vocab_size={config.model.vocab_size}: no rows for the tokenizer's infill"
                f" tokens; raise it to {rows}, or train with another objective"
            )
    if objective and not tokenizer.adds_bos and data.packing.kind != "whole":
        raise UserError(
            f"data.objective.kind={data.objective.kind}: needs data.packing.kind=whole, because the"
            " tokenizer adds no BOS, which would show where a document begins"
        )
    train, held_out = _streams(data, tokenizer)
    gain = objective.gain if objective else 0
    rows = {name: _pack("train", stream, data, gain) for name, stream in train.items()}
    if isinstance(data.objective, InfillObjective) and not isinstance(data.packing, WholePacking):
        for stream in train.values():
            _note_few_to_infill(stream, data.length)
    held_out_gain = gain if isinstance(objective, Replies) else 0
    held_out_rows = {
        name: _pack("held_out", stream, data, held_out_gain) for name, stream in held_out.items()
    }
    if isinstance(objective, Replies):
        has_marker = [objective.check(name, source_rows) for name, source_rows in rows.items()]
        if not any(has_marker):
            raise UserError(
                f"data.objective.after={data.objective.after!r}: does not appear in any training"
                " source; correct it"
            )
        for name, source_rows in held_out_rows.items():
            objective.check(name, source_rows, held_out=True)
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


def _streams(
    data: DataConfig, tokenizer: Tokenizer
) -> tuple[dict[str, TokenStream], dict[str, TokenStream]]:
    """Returns the training and the held-out documents of each source, by its name."""
    prepared = _each_source(data, "train", lambda s: prepare(s, tokenizer, data.prepare))
    if not isinstance(data.held_out, HeldOutShare):
        held_out = _each_source(data, "held_out", lambda s: prepare(s, tokenizer, data.prepare))
        return prepared, held_out
    sides = {s.name: split(prepared[s.name], s, data.held_out) for s in data.train}
    train, held_out = (
        {name: side[key] for name, side in sides.items()} for key in ("train", "held_out")
    )
    return train, held_out


def _pack(side: Side, stream: TokenStream, data: DataConfig, spare: int) -> Rows:
    if not isinstance(data.packing, WholePacking):
        return CutRows(stream, data.length)
    rows = WholeRows(stream, data.length, data.packing.too_long, spare)
    if rows.too_long:
        done = "are left out" if data.packing.too_long == "skip" else "lose their end"
        say(
            f"data.{side}, source {stream.name}: {rows.too_long:,} of {stream.documents:,}"
            f" documents are longer than a row of {data.length + 1} tokens and {done}"
        )
    if side == "train" and not len(rows):
        raise UserError(
            f"data.train, source {stream.name}: none of its documents fits a row; raise"
            " data.length, or set data.packing.too_long=cut"
        )
    return rows


def _note_few_to_infill(stream: TokenStream, length: int) -> None:
    """Says if few documents lie whole in a row that is cut from the stream anywhere."""
    tokens = np.diff(stream.document_ends(), prepend=0)
    whole = np.mean(np.maximum(0, length + 1 - tokens)) / length
    if whole < 0.5:
        say(
            f"note: source {stream.name}: about {whole:.0%} of the documents lie whole in a row of"
            f" {length + 1} tokens, and only these are cut for infilling: raise data.length, or set"
            " data.packing.kind=whole"
        )


def _each_source(
    data: DataConfig, side: Side, action: Callable[[SourceConfig], _Result]
) -> dict[str, _Result]:
    """Calls `action` with each source of a side; returns the results by name.

    If a source has no files, the UserError names its key in the recipe.
    """
    results = {}
    for i, source in enumerate(sources_of(data, side)):
        try:
            results[source.name] = action(source)
        except NoFiles as e:
            raise UserError(f"data.{side}.{i}.source.files: {e}") from None
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
                    " tokenizer.kind=train and tokenizer.vocab_size to train one)"
                ) from None
        case TrainedTokenizer() as wanted:
            return _trained(wanted, config.data)


def _trained(wanted: TrainedTokenizer, data: DataConfig) -> Tokenizer:
    key = [
        to_dict(wanted),
        [(to_dict(s), sources.version(s.source)) for s in data.train],
    ]
    if isinstance(data.held_out, HeldOutShare):
        key.append(to_dict(data.held_out))
    identity = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = storage.path(data.prepare.folder)
    path = folder / f"tokenizer-{identity[:16]}.model"
    with locked(folder, ".tokenizer.lock"):
        if not storage.exists(path):
            for side in ("train", "held_out"):  # a wrong path is known before minutes of work
                _each_source(data, side, _check_files)
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
        for text in texts_of(data, "train", source, report=lambda line: None):
            yield text
            left -= len(text.encode())
            if left <= 0:
                break
