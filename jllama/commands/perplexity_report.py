"""What `jllama evaluate perplexity` reports: tables, perplexity.csv and perplexity.png."""

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jllama.commands.legend import draw_legend
from jllama.commands.table import table
from jllama.files import storage


class Point(NamedTuple):
    """One row of the CSV: the figures of one model and scaling at one length."""

    model: str
    rope: str
    length: int
    stride: int
    windows: int
    perplexity: float
    bits_per_byte: float


def print_tables(points: list[Point], lengths: list[int], alike: bool) -> None:
    """Prints a table of perplexities if the models are `alike` in their targets; then of bits."""
    many = {p.windows for p in points}
    scored = f"of {min(many)} x {points[0].stride} tokens" if len(many) == 1 else ""
    for key in ("perplexity", "bits_per_byte") if alike else ("bits_per_byte",):
        rows = [[f"{key.replace('_', ' ')} {scored}", *(f"{length:,}" for length in lengths)]]
        for curve, label in _labels(points).items():
            values = [getattr(p, key) for p in points if (p.model, p.rope) == curve]
            rows.append([label, *(f"{value:.4g}" for value in values)])
        print(table(rows))


def write_files(
    out: Path, points: list[Point], trained: dict[str, int], alike: bool
) -> Iterator[Path]:
    """Writes the CSV and the PNG, and gives the path of each once it is there."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Point._fields)
    writer.writerows(points)
    storage.write_text(out / "perplexity.csv", text.getvalue())
    yield out / "perplexity.csv"
    picture = io.BytesIO()
    _draw(points, trained, alike).savefig(picture, dpi=120, format="png")
    storage.write_bytes(out / "perplexity.png", picture.getvalue())
    yield out / "perplexity.png"


def _labels(points: list[Point]) -> dict[tuple[str, str], str]:
    """The label of each curve: the model's name, its scaling, or both if both differ."""
    curves = list(dict.fromkeys((p.model, p.rope) for p in points))
    if len({model for model, _ in curves}) == 1 and len(curves) > 1:
        return {(model, rope): rope for model, rope in curves}
    return {(m, r): m if r == "model" else f"{m}, {r}" for m, r in curves}


def _draw(points: list[Point], trained: dict[str, int], alike: bool) -> Figure:
    """Perplexity against length, or bits per byte if the models have other targets."""
    key = "perplexity" if alike else "bits_per_byte"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    lines, labels = [], _labels(points)
    for curve in labels:
        of_curve = [p for p in points if (p.model, p.rope) == curve]
        lines += axis.plot([p.length for p in of_curve], [getattr(p, key) for p in of_curve], "o-")
    lengths = sorted({p.length for p in points})
    for length in sorted(set(trained.values())):
        if lengths[0] <= length <= lengths[-1]:
            axis.axvline(length, color="grey", linestyle=":", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.set_xlabel("context length (dotted: a model's max_length)")
    axis.set_ylabel(f"{key.replace('_', ' ')} of a window's last {points[0].stride} tokens")
    axis.grid(alpha=0.3)
    axis.minorticks_off()
    axis.set_yticks(ticks := _ticks([getattr(p, key) for p in points]), [f"{y:g}" for y in ticks])
    axis.tick_params("x", rotation=45 if len(lengths) > 8 else 0)
    draw_legend(figure, dict(zip(labels.values(), lines, strict=True)))
    return figure


def _ticks(values: list[float]) -> list[float]:
    """Round numbers on a logarithmic axis, four or more from the least value to the largest."""
    low, high = min(values), max(values)
    powers = [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * power for power in powers for step in steps]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            return inside
    return list(MaxNLocator(6).tick_values(low, high))
