"""`jllama plot`: draws loss, learning rate and throughput of one or several runs in one PNG."""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jllama.errors import UserError
from jllama.files import storage
from jllama.train.metrics import read

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


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.smooth < 1:
        raise UserError(f"--smooth={args.smooth}: must be from 0 to below 1")
    # A run is labelled by its name, or by its path if another run has the same name.
    names = [storage.path(run).name for run in args.runs]
    lines = {
        (name if names.count(name) == 1 else run): _read(storage.path(run))
        for name, run in zip(names, args.runs, strict=True)
    }
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for (key, title), axis in zip(_PANELS, axes, strict=True):
        for i, (name, metrics) in enumerate(lines.items()):
            color = f"C{i % 10}"
            step, value = _series(metrics, key)
            if key == "loss":
                axis.plot(step, value, color=color, alpha=0.25, linewidth=0.8)
                value = _smooth(value, args.smooth)
            axis.plot(step, value, color=color, label=name, linewidth=1.4)
            if key == "loss":
                step, value = _series(metrics, "eval_loss")
                label = f"{name}, held out" if len(step) else None
                axis.plot(step, value, "o--", color=color, markersize=4, label=label)
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    axes[2].set_ylim(bottom=0)
    try:
        figure.savefig(args.out, dpi=120, format="png")
    except OSError as e:
        raise UserError(f"{args.out}: {e.strerror}") from None
    print(args.out)


def _read(run: Path) -> list[dict[str, float]]:
    metrics = read(run / "metrics.jsonl")
    if not metrics:
        raise UserError(f"{run / 'metrics.jsonl'}: missing or empty; give folders of runs")
    return metrics


def _series(metrics: list[dict[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[key]) for line in metrics if key in line]
    return np.array([p[0] for p in points]), np.array([p[1] for p in points], float)


def _smooth(values: np.ndarray, past: float) -> np.ndarray:
    """The exponential moving average, corrected for its start."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = past * mean + (1 - past) * value
        weight = past * weight + (1 - past)
        out.append(mean / weight)
    return np.array(out)
