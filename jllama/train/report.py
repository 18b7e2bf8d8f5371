"""What a run says of itself: its first line, and its result."""

import dataclasses
import statistics
from pathlib import Path

import jax

from jllama.config import Config
from jllama.flops import parameter_count
from jllama.parallel.sharding import Placement
from jllama.train.metrics import METRICS, read
from jllama.train.state import StateDef


@dataclasses.dataclass(frozen=True)
class Result:
    """What `train` reports of the whole run, its earlier parts in the same folder included.

    Attributes:
      folder: the run's folder.
      steps: how many steps have been taken.
      done: whether `steps` is the recipe's number.
      stopped: whether a signal, to this process or another, ended it before its last step or
        before its evaluation was done.
      tokens: predicted tokens of all steps.
      seconds: training time of all steps, the compilation of the first one included.
      tokens_per_second: the median over steps, of computed tokens: prompts and padding too.
      eval: what `evaluate` returns of the trained model; None if the run is not done, or nothing
        is held out.
    """

    folder: Path
    steps: int
    done: bool
    stopped: bool
    tokens: int
    seconds: float
    tokens_per_second: float
    eval: dict[str, float] | None


def result(
    config: Config, folder: Path, step: int, stopped: bool, held_out: dict[str, float] | None
) -> Result:
    """Sums up what metrics.jsonl holds of the run."""
    lines = [line for line in read(folder / METRICS) if "weight" in line]
    speeds = [line["tokens_per_second"] for line in lines]
    return Result(
        folder=folder,
        steps=step,
        done=step == config.training.steps,
        stopped=stopped,
        tokens=int(sum(line["weight"] for line in lines)),
        seconds=sum(line["seconds"] for line in lines),
        tokens_per_second=statistics.median(speeds) if speeds else 0.0,
        eval=held_out,
    )


def opening_line(
    config: Config, placement: Placement, definition: StateDef, folder: Path, step: int
) -> str:
    """What runs, on which devices, and when it is first saved: said before a long compilation."""
    steps, every = config.training.steps, config.checkpoint.every
    sizes = [f"{axis}={n}" for axis, n in placement.mesh.shape.items() if n > 1]
    count, processes = placement.mesh.size, jax.process_count()
    trained = sum(x.size for x in jax.tree.leaves(definition.shapes.trainable))
    return "".join(
        [
            f"{folder}: {parameter_count(config.model):,} parameters",
            f", {trained:,} trained over them" if definition.frozen else "",
            f" on {count} {placement.platform} device{'s' * (count > 1)}",
            f" of {processes} processes" if processes > 1 else "",
            f", mesh {' '.join(sizes)}" if sizes else "",
            f"; a checkpoint every {every} steps"
            if 0 < every < steps
            else f"; no checkpoint before the end (checkpoint.every={every})",
            "; compiling the first step" if step < steps else "",
        ]
    )
