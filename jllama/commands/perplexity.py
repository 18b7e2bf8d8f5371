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
import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

import jllama
from jllama.adapt.mixture import adapter_weights
from jllama.commands.table import table
from jllama.config import JsonlSource, ParquetSource, Source, TextSource
from jllama.config import recipe as recipes
from jllama.data import source as sources
from jllama.data.split import sources_of, texts_of
from jllama.errors import UserError
from jllama.evaluate.perplexity import Rope, perplexity, rope_label, windows, with_rope
from jllama.files import storage
from jllama.generate.llama import Llama
from jllama.progress import Progress
from jllama.store.find import find
from jllama.store.model import architecture_at, open_adapted
from jllama.text.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument

    def in_order(option: str, metavar: str, text: str) -> None:
        """--adapter and --rope apply to models before them, so that all are kept in their order."""
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
    add(
        "--data",
        required=True,
        metavar="DATA",
        help="a recipe or a run, for its held-out text; or a file or glob: text, .jsonl, .parquet",
    )
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


class Point(NamedTuple):
    """One row of the CSV: the perplexity of one model and scaling at one length."""

    model: str
    rope: str
    length: int
    stride: int
    windows: int
    perplexity: float


def run(args: argparse.Namespace) -> None:
    lengths = _lengths(args.lengths)
    stride = min(256, max(1, lengths[0] // 2)) if args.stride is None else args.stride
    if not 1 <= stride <= lengths[0]:
        raise UserError(f"--stride={stride}: must be from 1 to the least length, {lengths[0]}")
    if args.windows < 0:
        raise UserError(f"--windows={args.windows}: must be a number of windows, or 0 for all")
    models, out = _models(args.given), storage.path(args.out)
    storage.make_folder(out)
    trained = {}
    for name, path, ropes, adapters in models:  # errors first, before minutes of work
        given = {adapter: adapter for adapter in adapters} or None
        config = open_adapted(find(storage.path(path)), given).config
        trained[name] = config.max_length
        for rope in ropes:
            with_rope(config, rope, lengths[-1])
    points, first = [], None
    for name, path, ropes, adapters in models:
        more, first = _evaluate(args, name, path, ropes, adapters, lengths, stride, first)
        points += more
    _print(points, lengths)
    _write(out, points, trained)


def _evaluate(args, name, path, ropes, adapters, lengths, stride, first):
    """A model's points and windows, which must equal `first`; the model is freed on return."""
    given = {adapter: adapter for adapter in adapters} or None
    model = jllama.load(path, dtype=args.dtype, adapter=given)
    texts = _encoded(model, path, _read(args.data))
    ids = windows(texts, lengths[-1], stride, args.windows, args.join)
    if first and not (len(first) == len(ids) and all(map(np.array_equal, first, ids))):
        raise UserError(
            f"{path}: its tokenizer is not that of the models before it, and perplexities per"
            " token of different tokenizers cannot be compared; evaluate it on its own"
        )
    points = []
    total = len(ids) * sum(lengths) * len(ropes)
    with Progress(f"perplexity of {name}", total, unit=" tokens") as progress:
        for rope in ropes:
            for length in lengths:
                value = perplexity(
                    model, ids, length, stride, rope, progress.advance, adapters or None
                )
                points.append(Point(name, rope_label(rope), length, stride, len(ids), value))
    return points, ids


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = [0]
    if not 1 <= lengths[0] <= lengths[-1] < 2**31:
        raise UserError(f"--lengths={text}: must be numbers from 1 on, separated by commas")
    return lengths


def _models(
    given: list[tuple[str, str]],
) -> list[tuple[str, str, list[Rope], dict[str, float]]]:
    """(name, path, scalings, weights of adapters) of each --model."""
    models: list[list] = []
    for option, value in given:
        if option == "--model":
            name, equals, path = value.partition("=")
            if not equals or not name or "/" in name:
                name, path = storage.absolute(storage.path(value)).name, value
            models.append([name, path, None, []])
            continue
        if option == "--adapter":
            if not models:
                raise UserError(f"--adapter {value}: must come after the --model that it is for")
            models[-1][3].append(value)
            continue
        without = [model for model in models if model[2] is None]
        if not without:
            raise UserError(
                f"--rope {value}: must come after the --model that it is for, and once: several"
                " scalings are one list, separated by commas"
            )
        for model in without:
            model[2] = _ropes(value)
    if not models:
        raise UserError("--model PATH: name a run, a step of it, or a model's folder")
    names = [name for name, *_ in models]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--model: two are called {name!r}; name them: --model NAME=PATH")
    return [
        (name, path, ropes or ["model"], adapter_weights(adapters))
        for name, path, ropes, adapters in models
    ]


def _ropes(text: str) -> list[Rope]:
    """The scalings of a YAML list without its brackets, each once."""
    ropes = recipes.override({}, [f"rope=[{text}]"])["rope"]
    if not ropes or not all(isinstance(rope, str | dict) for rope in ropes):
        raise UserError(f"--rope {text!r}: must list kinds, or scalings such as {{kind: yarn}}")
    return list({rope_label(rope): rope for rope in ropes}.values())


def _read(data: str) -> Iterator[str]:
    """The texts of --data, one after the other."""
    path = storage.path(data)
    if path.suffix in (".yaml", ".yml"):
        recipe = recipes.load(path, architecture=architecture_at)
    elif storage.exists(path / "config.yaml"):
        recipe = recipes.load(path / "config.yaml")
    else:
        yield from (document.text for document in sources.documents(_source(data)))
        return
    if not recipe.data.held_out:
        raise UserError(f"--data {data}: the recipe has no data.held_out")
    for source in sources_of(recipe.data, "held_out"):
        yield from texts_of(recipe.data, "held_out", source)


def _source(data: str) -> Source:
    name = data.removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".json")):
        return JsonlSource(kind="jsonl", files=(data,))
    if name.endswith(".parquet"):
        return ParquetSource(kind="parquet", files=(data,))
    return TextSource(kind="text", files=(data,))


def _encoded(model: Llama, path: str, documents: Iterable[str]) -> Iterator[np.ndarray]:
    tokenizer: Tokenizer | None = model.tokenizer
    if tokenizer is None:
        raise UserError(f"{path}: has no tokenizer; put its files there")
    for text in documents:
        ids = [*tokenizer.encode(text, bos=tokenizer.adds_bos), tokenizer.eos_id]
        if max(ids) >= model.config.vocab_size:
            raise UserError(f"{path}: the tokenizer has ids beyond the model's vocabulary")
        yield np.array(ids, np.int32)


def _labels(points: list[Point]) -> dict[tuple[str, str], str]:
    """The label of each curve: the model's name, its scaling, or both if both differ."""
    curves = list(dict.fromkeys((p.model, p.rope) for p in points))
    if len({model for model, _ in curves}) == 1 and len(curves) > 1:
        return {(model, rope): rope for model, rope in curves}
    return {(m, r): m if r == "model" else f"{m}, {r}" for m, r in curves}


def _print(points: list[Point], lengths: list[int]) -> None:
    scored = f"perplexity of {points[0].windows} x {points[0].stride} tokens"
    rows = [[scored, *(f"{length:,}" for length in lengths)]]
    for curve, label in _labels(points).items():
        values = [p.perplexity for p in points if (p.model, p.rope) == curve]
        rows.append([label, *(f"{value:.4g}" for value in values)])
    print(table(rows))


def _write(out: Path, points: list[Point], trained: dict[str, int]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Point._fields)
    writer.writerows(points)
    storage.write_text(out / "perplexity.csv", text.getvalue())
    print(out / "perplexity.csv")
    picture = io.BytesIO()
    _draw(points, trained).savefig(picture, dpi=120, format="png")
    storage.write_bytes(out / "perplexity.png", picture.getvalue())
    print(out / "perplexity.png")


def _draw(points: list[Point], trained: dict[str, int]) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    lines, labels = [], _labels(points)
    for curve in labels:
        of_curve = [p for p in points if (p.model, p.rope) == curve]
        lines += axis.plot([p.length for p in of_curve], [p.perplexity for p in of_curve], "o-")
    lengths = sorted({p.length for p in points})
    for length in sorted(set(trained.values())):
        if lengths[0] <= length <= lengths[-1]:
            axis.axvline(length, color="grey", linestyle=":", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.set_xlabel("context length (dotted: a model's max_length)")
    axis.set_ylabel(f"perplexity of a window's last {points[0].stride} tokens")
    axis.grid(alpha=0.3, which="both")
    legend = axis.legend(lines, ["" for _ in lines], fontsize="small")
    for text, label in zip(legend.get_texts(), labels.values(), strict=True):
        text.set_parse_math(False)  # a name may hold $, which would begin a formula
        text.set_text(label)
    return figure
