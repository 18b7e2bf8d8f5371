"""Where metrics go: `metrics.jsonl`, TensorBoard, and a person's eyes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm


class Metrics:
    """Writes a run's metrics from `start` on; what an earlier run wrote beyond it is dropped."""

    def __init__(self, run: Path, start: int, steps: int, log_every: int):
        path = run / "metrics.jsonl"
        kept = [line for line in read(path) if line["step"] <= start]
        # Written beside and put in place at once: a kill here loses nothing.
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(part, path)
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # a line at a time  # noqa: SIM115
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=None, smoothing=0.05)
        self._every = log_every

    def write(self, step: int, values: dict[str, float]) -> None:
        """The metrics of a training step."""
        self._record(step, values)
        brief = (
            f"loss {values['loss']:.3f}  grad {values['grad_norm']:.2f}"
            f"  lr {values['learning_rate']:.2e}  {values['tokens_per_second']:,.0f} tok/s"
        )
        self._bar.set_postfix_str(brief, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable and step % self._every == 0:
            self.say(f"step {step}  {brief}")

    def write_eval(self, step: int, values: dict[str, float]) -> None:
        """The metrics of an evaluation."""
        self._record(step, {f"eval_{k}": v for k, v in values.items()})
        self.say(
            f"step {step}  held-out loss {values['loss']:.4f}"
            f"  bits per byte {values['bits_per_byte']:.4f}"
        )

    def say(self, line: str) -> None:
        """A line on stderr that leaves the progress bar whole."""
        tqdm.write(line, file=sys.stderr)

    def _record(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flushes everything."""
        self._bar.close()
        self._board.close()
        self._file.close()


class NoMetrics:
    """`Metrics` of a process that does not lead: another one writes them."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def write_eval(self, step: int, values: dict[str, float]) -> None: ...

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
