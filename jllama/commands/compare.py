"""`jllama compare`: what differs between the recipes of runs, and how far each run came."""

import argparse
import json
import statistics
from typing import Any

from jllama.commands.runs import Metrics, labelled, metrics_of, points, recipe_of, text_of
from jllama.commands.table import table

# Each run has another name, and where it lies does not matter.
_NOT_COMPARED = ("run.name", "run.folder")
# metric: its name in the table. The lowest value is the best.
_LOSSES = {
    "loss": "training loss",
    "eval_loss": "held-out loss",
    "eval_bits_per_byte": "bits per byte",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders or their URLs")
    parser.add_argument("--json", action="store_true", help="print exact figures as JSON")


def run(args: argparse.Namespace) -> None:
    folders = labelled(args.runs)
    figures = {name: _figures(metrics_of(folder)) for name, folder in folders.items()}
    differing = _differences({name: recipe_of(folder) for name, folder in folders.items()})
    if args.json:
        runs = {
            name: {"recipe": {key: values[name] for key, values in differing.items()}} | results
            for name, results in figures.items()
        }
        print(json.dumps(runs, indent=2))
        return
    print(_page(list(folders), differing, figures))


def _figures(metrics: Metrics) -> dict[str, Any]:
    """Steps, the median speed, and of each loss the last and the best value with its step."""
    figures: dict[str, Any] = {"steps": int(max(line["step"] for line in metrics))}
    for key in _LOSSES:
        values = points(metrics, key)
        best = min(values, key=lambda point: point[1], default=(None, None))
        figures[key] = values and {"last": values[-1][1], "best": best[1], "best_step": best[0]}
    speeds = [value for _, value in points(metrics, "tokens_per_second")]
    figures["tokens_per_second"] = statistics.median(speeds) if speeds else None
    return {key: value or None for key, value in figures.items()}


def _differences(recipes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The values by run of each key that differs; None where a recipe has no such key."""
    keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    rows = {key: {name: recipe.get(key) for name, recipe in recipes.items()} for key in keys}
    return {
        key: values
        for key, values in rows.items()
        if key not in _NOT_COMPARED and len({json.dumps(value) for value in values.values()}) > 1
    }


def _page(
    names: list[str], differing: dict[str, dict[str, Any]], figures: dict[str, dict[str, Any]]
) -> str:
    rows = [["", *names]]
    for key, values in differing.items():
        rows.append([key, *(text_of(values[name]) for name in names)])
    rows.append(["steps", *(f"{figures[name]['steps']:,}" for name in names)])
    for key, title in _LOSSES.items():
        losses = [figures[name][key] for name in names]
        if any(losses):
            rows.append([f"{title}, last", *(f"{x['last']:.4f}" if x else "-" for x in losses)])
            best = (f"{x['best']:.4f} at {x['best_step']:,}" if x else "-" for x in losses)
            rows.append([f"{title}, best", *best])
    speeds = [figures[name]["tokens_per_second"] for name in names]
    rows.append(["tokens per second", *(f"{x:,.0f}" if x else "-" for x in speeds)])
    return table(rows)
