"""Perplexity against the length of the context, of one or several models.

The data are cut into windows of the largest length; the last STRIDE tokens of each are scored,
behind as many tokens as each of the lengths says. So every length and every model has the same
targets, and two windows share none. A window lies within one document unless --join cuts across
them. Lengths may be above what the models were trained for.

--rope names scalings of the rotary frequencies to try in place of the model's own. They begin at
L0, the length that it was trained for before its own scaling: original_length, with linear scaling
max_length over its factor, else max_length. Where no factor is given, it is the least that reaches
the length L at hand, and no less than the model's own.

  model         the model's own
  none          none
  pi[:F]        position interpolation: positions divided by F
  ntk:A         NTK-aware: theta times A^(N/(N-2)), N the width of a head
  dynamic[:F]   dynamic NTK: A = F L/L0 - (F-1) above L0 [F is 2]
  adaptive[:C]  Chinese-LLaMA's: A = C (2 L/L0 - 1) above L0, interpolation included [C is 1]
  yarn[:F]      YaRN with factor F

ntk and adaptive come on top of the position interpolation of a model that has one; the others
replace what it has. docs/long-context.md says what each is good for.
"""

import argparse
import csv
import dataclasses
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib
import numpy as np

import jllama
from jllama.config import JsonlSource, ParquetSource, Source, TextSource
from jllama.config import recipe as recipes
from jllama.data import source as sources
from jllama.errors import UserError
from jllama.evaluate.perplexity import perplexity, scaled, windows
from jllama.files import storage
from jllama.generate.llama import Llama, adapter_weights
from jllama.progress import Progress
from jllama.store.find import find
from jllama.store.model import architecture_at, open_adapted
from jllama.text.tokenizer import Tokenizer

matplotlib.use("Agg")  # a file is all that is wanted; no display is needed

from matplotlib import pyplot


class _Given(argparse.Action):
    """--model, --adapter and --rope, in their order: the latter are of the models before them."""

    def __call__(self, parser, namespace, value, option=None):
        getattr(namespace, self.dest).append((option, value))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.set_defaults(given=[])
    add(
        "--model",
        action=_Given,
        dest="given",
        default=argparse.SUPPRESS,
        metavar="[NAME=]PATH",
        help="a run, a step of it, or a model's folder; several may be given, with names",
    )
    add(
        "--adapter",
        action=_Given,
        dest="given",
        default=argparse.SUPPRESS,
        metavar="PATH[=WEIGHT]",
        help="over the --model before it: a LoRA run or a folder of PEFT's; several add up",
    )
    add(
        "--rope",
        action=_Given,
        dest="given",
        default=argparse.SUPPRESS,
        metavar="LIST",
        help="scalings of the --model before it, and of those before that have none yet [model]",
    )
    add(
        "--data",
        required=True,
        metavar="DATA",
        help="a recipe or a run, for its held-out text; or a file or glob: text, .jsonl, .parquet",
    )
    add("--lengths", default="512,1024,2048,4096", metavar="LIST", help="[%(default)s]")
    add("--stride", type=int, help="targets of a window [half the least length, 256 at most]")
    add("--windows", type=int, default=32, help="at most; 0 is all there are [%(default)s]")
    add("--join", action="store_true", help="cut windows from all documents, put together")
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation [the model's]")
    add("--out", default="perplexity", metavar="FOLDER", help="of the CSV and PNG [%(default)s]")


@dataclasses.dataclass(frozen=True)
class Point:
    """One figure: a row of the CSV."""

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
        raise UserError(f"--stride={stride}: from 1 to the least of --lengths, {lengths[0]}")
    if args.windows < 0:
        raise UserError(f"--windows={args.windows}: 0 for all, or above")
    models, out = _models(args.given), storage.path(args.out)
    storage.make_folder(out)  # or say that it cannot be
    trained = {}
    for name, path, ropes, adapters in models:  # what is wrong, before minutes of work on another
        given = {adapter: storage.path(adapter) for adapter in adapters} or None
        config = open_adapted(find(storage.path(path)), given).config
        trained[name] = config.max_length
        for rope in ropes:
            scaled(config, rope, lengths[-1])
    points, first = [], None
    for name, path, ropes, adapters in models:
        found, ids = _evaluate(args, name, path, ropes, adapters, lengths, stride, first)
        points, first = points + found, ids
    _print(points, lengths)
    _write(out, points, trained)


def _evaluate(args, name, path, ropes, adapters, lengths, stride, first):
    """A model's points and windows, which must be `first`; when it returns, the model is gone."""
    given = {adapter: adapter for adapter in adapters} or None
    model = jllama.load(path, dtype=args.dtype, adapter=given)
    texts = _encoded(model, path, _read(args.data))
    ids = windows(texts, lengths[-1], stride, args.windows, args.join)
    if first and not (len(first) == len(ids) and all(map(np.array_equal, first, ids))):
        raise UserError(
            f"{path}: its tokenizer is not that of the models before it, and perplexities per"
            " token of several are not to be compared; evaluate it on its own"
        )
    return _measure(name, model, ids, lengths, stride, ropes, adapters), ids


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = [0]
    if not 1 <= lengths[0] <= lengths[-1] < 2**31:
        raise UserError(f"--lengths={text}: numbers of 1 or above, with commas between them")
    return lengths


def _models(
    given: list[tuple[str, str]],
) -> list[tuple[str, str, tuple[str, ...], dict[str, float]]]:
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
                raise UserError(f"--adapter {value}: comes after the --model that it is for")
            models[-1][3].append(value)
            continue
        without = [model for model in models if model[2] is None]
        if not without:
            raise UserError(
                f"--rope {value}: comes after the --model that it is for, once, with commas between"
                " several"
            )
        for model in without:
            model[2] = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
    if not models:
        raise UserError("--model PATH: which model? a run, a step of it, or a model's folder")
    names = [name for name, *_ in models]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--model: two are called {name!r}; name them: --model NAME=PATH")
    return [
        (name, path, ropes or ("model",), adapter_weights(adapters))
        for name, path, ropes, adapters in models
    ]


def _read(data: str) -> Iterator[str]:
    """The texts, one after the other."""
    path = storage.path(data)
    if path.suffix in (".yaml", ".yml"):
        recipe = recipes.load(path, architecture=architecture_at)
    elif storage.exists(path / "config.yaml"):
        recipe = recipes.load(path / "config.yaml")
    else:
        yield from (document.text for document in sources.documents(_source(data)))
        return
    if not recipe.data.held_out:
        raise UserError(f"--data {data}: the recipe holds no text out (data.held_out)")
    for source in recipe.data.held_out:
        skipped = recipe.data.prepare.max_skipped
        for document in sources.documents(source.source, max_skipped=skipped):
            yield document.text


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
        ids = [*tokenizer.encode(text, bos=True), tokenizer.eos_id]
        if max(ids) >= model.config.vocab_size:
            raise UserError(f"{path}: the tokenizer has ids beyond the model's vocabulary")
        yield np.array(ids, np.int32)


def _measure(name, model, ids, lengths, stride, ropes, adapters) -> list[Point]:
    points = []
    total = len(ids) * sum(lengths) * len(ropes)
    with Progress(f"perplexity of {name}", total, unit=" tokens") as progress:
        for rope in ropes:
            for length in lengths:
                found = perplexity(
                    model, ids, length, stride, rope, progress.advance, adapters or None
                )
                points.append(Point(name, rope, length, stride, len(ids), found))
    return points


def _labels(points: list[Point]) -> dict[tuple[str, str], str]:
    """What each curve is called: the model's name, and its scaling where it has several."""
    curves = list(dict.fromkeys((p.model, p.rope) for p in points))
    if len({model for model, _ in curves}) == 1 and len(curves) > 1:
        return {(model, rope): rope for model, rope in curves}
    return {(m, r): m if r == "model" else f"{m}, {r}" for m, r in curves}


def _print(points: list[Point], lengths: list[int]) -> None:
    scored = f"perplexity of {points[0].windows} x {points[0].stride} tokens"
    rows = [[scored, *(f"{length:,}" for length in lengths)]]
    for curve, label in _labels(points).items():
        own = [p.perplexity for p in points if (p.model, p.rope) == curve]
        rows.append([label, *(f"{value:.4g}" for value in own)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for label, *figures in rows:
        cells = [cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=True)]
        print("  ".join([label.ljust(widths[0]), *cells]))


def _write(out: Path, points: list[Point], trained: dict[str, int]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(Point)])
    writer.writerows(dataclasses.astuple(point) for point in points)
    storage.write_text(out / "perplexity.csv", table.getvalue())
    print(out / "perplexity.csv")
    picture = io.BytesIO()
    _draw(points, trained).savefig(picture, dpi=120, format="png")
    storage.write_bytes(out / "perplexity.png", picture.getvalue())
    print(out / "perplexity.png")


def _draw(points: list[Point], trained: dict[str, int]) -> pyplot.Figure:
    figure, axis = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    lines, labels = [], _labels(points)
    for curve in labels:
        own = [p for p in points if (p.model, p.rope) == curve]
        lines += axis.plot([p.length for p in own], [p.perplexity for p in own], "o-")
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
        text.set_parse_math(False)  # a name with $ is no formula
        text.set_text(label)
    return figure
