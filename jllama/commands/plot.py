"""`jllama plot`: draws loss, learning rate and throughput of one or several runs in one PNG."""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jllama.commands.legend import draw_legend
from jllama.commands.runs import Metrics, labelled, metrics_of, points, recipe_of, text_of
from jllama.errors import UserError

_PANELS = (
    ("loss", "loss (nats per token)"),
    ("learning_rate", "learning rate"),
    ("tokens_per_second", "tokens per second"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders or their URLs")
    parser.add_argument(
        "--out", type=Path, default=Path("runs.png"), metavar="FILE", help="the PNG [runs.png]"
    )
    parser.add_argument(
        "--smooth",
        type=float,
        default=0.9,
        help="weight of the past in the loss curve, 0 to 1 [0.9]",
    )
    parser.add_argument(
        "--group",
        metavar="KEY",
        help="one colour for all runs with an equal value of this key of their recipes",
    )


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.smooth < 1:
        raise UserError(f"--smooth={args.smooth}: must be from 0 to below 1")
    folders = labelled(args.runs)
    runs = {name: metrics_of(folder) for name, folder in folders.items()}
    groups = _groups(args.group, folders) if args.group else {name: name for name in runs}
    colors = {group: f"C{i % 10}" for i, group in enumerate(dict.fromkeys(groups.values()))}
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    lines = {}
    for (key, title), axis in zip(_PANELS, axes, strict=True):
        for name, group in groups.items():
            color, metrics = colors[group], runs[name]
            step, value = _series(metrics, key)
            if key == "loss":
                axis.plot(step, value, color=color, alpha=0.25, linewidth=0.8)
                value = _smooth(value, args.smooth)
            (line,) = axis.plot(step, value, color=color, linewidth=1.4)
            if key == "loss":
                label = f"{name} ({args.group} {group})" if args.group else name
                if len(value):
                    lines[f"{label}: {value[-1]:.3f}"] = line
                step, value = _series(metrics, "eval_loss")
                (line,) = axis.plot(step, value, "o--", color=color, markersize=4)
                if len(value):
                    lines[f"{label}, held out: {value[-1]:.3f}"] = line
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    axes[2].set_ylim(bottom=0)
    draw_legend(figure, lines)
    try:
        figure.savefig(args.out, dpi=120, format="png")
    except OSError as e:
        raise UserError(f"{args.out}: {e.strerror}") from None
    print(args.out)


def _groups(key: str, folders: dict[str, Path]) -> dict[str, str]:
    """The text of a recipe's value by run, in the order of the values."""
    values = {name: recipe_of(folder).get(key) for name, folder in folders.items()}
    if all(value is None for value in values.values()):
        raise UserError(
            f"--group {key}: no run's recipe has this key; give one such as training.schedule.peak"
        )
    numbers = all(isinstance(value, int | float) for value in values.values())
    order = sorted(values, key=lambda name: values[name] if numbers else text_of(values[name]))
    return {name: text_of(values[name]) for name in order}


def _series(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = points(metrics, key)
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], float)


def _smooth(values: np.ndarray, past: float) -> np.ndarray:
    """The exponential moving average, corrected for its start."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = past * mean + (1 - past) * value
        weight = past * weight + (1 - past)
        out.append(mean / weight)
    return np.array(out)
