"""What `compare` and `plot` read of run folders: their labels, metrics and recipes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.files import storage
from jllama.store.find import RECIPE
from jllama.train.changes import flatten
from jllama.train.metrics import METRICS, read

Metrics = list[dict[str, float]]


def labelled(runs: Sequence[str]) -> dict[str, Path]:
    """The folders by label: the run's name, or its path if another run has the same name."""
    names = [storage.absolute(storage.path(run)).name for run in runs]
    return {
        (name if names.count(name) == 1 else run): storage.path(run)
        for name, run in zip(names, runs, strict=True)
    }


def metrics_of(folder: Path) -> Metrics:
    """The lines of a run's metrics.jsonl; UserError if there are none."""
    metrics = read(folder / METRICS)
    if not metrics:
        raise UserError(f"{folder / METRICS}: missing or empty; give folders of runs")
    return metrics


def recipe_of(folder: Path) -> dict[str, Any]:
    """The values of a run's recipe by dotted key."""
    return flatten(recipes.to_dict(recipes.load(folder / RECIPE)))


def points(metrics: Metrics, key: str) -> list[tuple[int, float]]:
    """The steps that have a metric, and its values there."""
    return [(int(line["step"]), float(line[key])) for line in metrics if key in line]


def text_of(value: Any) -> str:
    """A recipe's value in a table, on one line; a key that a recipe has not is a dash."""
    if value is None:
        return "-"
    plain = isinstance(value, str) and value and value.isprintable()
    return value if plain else json.dumps(value, ensure_ascii=False)
