"""Perplexity against the length of the context, of one or several models.

The data are cut into windows of the largest length. The last STRIDE tokens of a window are scored
once for each length, with only the last that many tokens of the window as input. So every length
and every model has the same targets, and no two windows share a target. A window lies within one
document unless --join cuts across them. Lengths may be above what the models were trained for.

--rope lists scalings of the rotary frequencies to try in place of the model's own. Each is written
as model.rope in a recipe, or as its kind alone; "model" is the model's own:

  --rope 'model, none, linear, {kind: ntk, alpha: 4}, {kind: yarn, factor: 8}'

The kinds are none, linear, ntk, dynamic, adaptive, yarn and llama3; docs/long-context.md explains
them, and train.py --help lists their keys. A key that is left out, and that the model and the
length determine, is filled in:

  original_length  the length that the model was trained for before its own scaling: that scaling's
                   original_length, with linear scaling max_length over its factor, else max_length;
                   for adaptive the length after position interpolation
  factor           for linear, yarn and llama3 the least that reaches the length at hand, and at
                   least the model's own factor; for dynamic 2; for adaptive the factor of the
                   model's position interpolation

ntk and adaptive apply on top of the position interpolation of a model that has one; the other kinds
replace the model's scaling.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator

import numpy as np

import jllama
from jllama.adapt.mixture import adapter_weights
from jllama.commands.perplexity_report import Point, print_tables, write_files
from jllama.config import Config, JsonlSource, ParquetSource, Source
from jllama.config import recipe as recipes
from jllama.data import source as sources
from jllama.data.split import sources_of, texts_of
from jllama.errors import UserError
from jllama.evaluate.perplexity import Rope, perplexity, rope_label, windows, with_rope
from jllama.files import storage
from jllama.generate.llama import Llama
from jllama.progress import Progress, say
from jllama.store.find import find
from jllama.store.model import architecture_at, open_adapted
from jllama.text.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument

    def in_order(option: str, metavar: str, text: str) -> None:
        """Options that apply to the models before them are kept in their order."""
        kept = {"action": "append", "dest": "given", "default": [], "metavar": metavar}
        add(option, type=lambda value: (option, value), help=text, **kept)

    in_order(
        "--model",
        "[NAME=]PATH",
        "a run, a step of it, or a model's folder; several may be given, with names",
    )
    in_order(
        "--adapter",
        "PATH[=WEIGHT]",
        "over the --model before it: a LoRA run or a folder of PEFT's; several add up",
    )
    in_order(
        "--rope",
        "LIST",
        "scalings for the --model before it, and for earlier ones that have none yet [model]",
    )
    in_order("--tokenizer", "PATH", "for the --model before it: another than its own")
    add(
        "--data",
        required=True,
        metavar="DATA",
        help="a recipe or a run, for its held-out text; or a file or glob: text, .jsonl, .parquet",
    )
    add("--field", help="key or column of --data's JSON or Parquet that holds the text [text]")
    add(
        "--lengths",
        default="512,1024,2048,4096",
        metavar="LIST",
        help="context lengths in tokens [%(default)s]",
    )
    add("--stride", type=int, help="targets of a window [half the least length, 256 at most]")
    add("--windows", type=int, default=32, help="windows at most; 0 takes all [%(default)s]")
    add("--join", action="store_true", help="cut windows from the concatenation of all documents")
    add("--dtype", choices=("float32", "bfloat16"), help="dtype of the computation [the model's]")
    add("--out", default="perplexity", metavar="FOLDER", help="for the CSV and PNG [%(default)s]")
    add("--json", action="store_true", help="print exact figures as JSON")


def run(args: argparse.Namespace) -> None:
    lengths = _lengths(args.lengths)
    stride = min(256, max(1, lengths[0] // 2)) if args.stride is None else args.stride
    if not 1 <= stride <= lengths[0]:
        raise UserError(f"--stride={stride}: must be from 1 to the least length, {lengths[0]}")
    if args.windows < 0:
        raise UserError(f"--windows={args.windows}: must be a number of windows, or 0 for all")
    data = _data(args.data, args.field)
    models, out = _models(args.given), storage.path(args.out)
    storage.make_folder(out)
    trained = {}
    for model in models:  # errors first, before minutes of work
        found = find(storage.path(model.path))
        config = open_adapted(found, model.overlays, tokenizer=model.tokenizer).config
        trained[model.name] = config.max_length
        for rope in model.ropes:
            with_rope(config, rope, lengths[-1])
    points, first, alike = [], None, True
    for model in models:
        more, ids = _evaluate(args, data, model, lengths, stride)
        points += more
        first = ids if first is None else first
        alike &= len(first) == len(ids) and all(map(np.array_equal, first, ids))
    if not alike:
        say("note: the tokenizers differ; bits per byte compare, and perplexities per token do not")
    if args.json:
        print(json.dumps([point._asdict() for point in points], indent=2))
    else:
        print_tables(points, lengths, alike)
    for file in write_files(out, points, trained, alike):
        if not args.json:
            print(file)


def _evaluate(args, data: Config | Source, given: "_Given", lengths, stride):
    """A model's points and windows; the model is freed on return."""
    model = jllama.load(
        given.path, dtype=args.dtype, adapter=given.overlays, tokenizer=given.tokenizer
    )
    texts = _encoded(model, given.path, _read(data))
    ids = windows(texts, lengths[-1], stride, args.windows, args.join)
    size = sum(model.tokenizer.byte_count(row[-stride:]) for row in ids)
    if not size:
        raise UserError(f"--data {args.data}: the scored tokens have no text; choose other data")
    points = []
    total = len(ids) * sum(lengths) * len(given.ropes)
    with Progress(f"perplexity of {given.name}", total, unit=" tokens") as progress:
        for rope in given.ropes:
            for length in lengths:
                value = perplexity(
                    model, ids, length, stride, rope, progress.advance, given.weights or None
                )
                bits = math.log2(value) * len(ids) * stride / size
                label = rope_label(rope)
                points.append(Point(given.name, label, length, stride, len(ids), value, bits))
    return points, ids


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = [0]
    if not 1 <= lengths[0] <= lengths[-1] < 2**31:
        raise UserError(f"--lengths={text}: must be numbers from 1 on, separated by commas")
    return lengths


@dataclasses.dataclass
class _Given:
    """A --model, and what the options after it say of it; `weights` are those of its adapters."""

    name: str
    path: str
    ropes: list[Rope] | None = None
    adapters: list[str] = dataclasses.field(default_factory=list)
    tokenizer: str | None = None

    @property
    def weights(self) -> dict[str, float]:
        return adapter_weights(self.adapters)

    @property
    def overlays(self) -> dict[str, str] | None:
        """The argument `adapter` of `jllama.load`."""
        return {path: path for path in self.weights} or None


def _models(given: list[tuple[str, str]]) -> list[_Given]:
    models: list[_Given] = []
    for option, value in given:
        if option == "--model":
            name, equals, path = value.partition("=")
            if not equals or not name or "/" in name:
                name, path = storage.absolute(storage.path(value)).name, value
            models.append(_Given(name, path))
            continue
        if option in ("--adapter", "--tokenizer"):
            if not models:
                raise UserError(f"{option} {value}: must come after the --model that it is for")
            if option == "--adapter":
                models[-1].adapters.append(value)
            else:
                models[-1].tokenizer = value
            continue
        without = [model for model in models if model.ropes is None]
        if not without:
            raise UserError(
                f"--rope {value}: must come after the --model that it is for, and once: several"
                " scalings are one list, separated by commas"
            )
        for model in without:
            model.ropes = _ropes(value)
    if not models:
        raise UserError("--model PATH: name a run, a step of it, or a model's folder")
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--model: two are called {name!r}; name them: --model NAME=PATH")
    for model in models:
        model.ropes = model.ropes or ["model"]
        adapter_weights(model.adapters)  # an error is known before minutes of work
    return models


def _ropes(text: str) -> list[Rope]:
    """The scalings of a YAML list without its brackets, each once."""
    ropes = recipes.override({}, [f"rope=[{text}]"])["rope"]
    if not ropes or not all(isinstance(rope, str | dict) for rope in ropes):
        raise UserError(f"--rope {text!r}: must list kinds, or scalings such as {{kind: yarn}}")
    return list({rope_label(rope): rope for rope in ropes}.values())


def _data(data: str, field: str | None) -> Config | Source:
    """What --data names: a recipe, a run's or one of a file; or the source of files."""
    path = storage.path(data)
    file = path if path.suffix in (".yaml", ".yml") else path / "config.yaml"
    if file == path or storage.exists(file):
        found: Config | Source = recipes.load(file, architecture=architecture_at)
        if not found.data.held_out:
            raise UserError(f"--data {data}: the recipe has no data.held_out")
    else:
        found = sources.of_files(data)
    if field is None:
        return found
    if not isinstance(found, JsonlSource | ParquetSource):
        raise UserError(f"--field {field}: is for JSON and Parquet, which --data {data} is not")
    return dataclasses.replace(found, field=field)


def _read(data: Config | Source) -> Iterator[str]:
    """The texts of --data, one after the other."""
    if not isinstance(data, Config):
        yield from (document.text for document in sources.documents(data))
        return
    for source in sources_of(data.data, "held_out"):
        yield from texts_of(data.data, "held_out", source)


def _encoded(model: Llama, path: str, documents: Iterable[str]) -> Iterator[np.ndarray]:
    tokenizer: Tokenizer | None = model.tokenizer
    if tokenizer is None:
        raise UserError(f"{path}: has no tokenizer; give one after its --model: --tokenizer PATH")
    for text in documents:
        ids = [*tokenizer.encode(text, bos=tokenizer.adds_bos), tokenizer.eos_id]
        if max(ids) >= model.config.vocab_size:
            raise UserError(f"{path}: the tokenizer has ids beyond the model's vocabulary")
        yield np.array(ids, np.int32)
