"""Where metrics go: `metrics.jsonl`, TensorBoard, and a person's eyes."""

import contextlib
import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from jllama.errors import UserError
from jllama.files import storage
from jllama.files.mirror import Mirror
from jllama.progress import say

_NAME = "metrics.jsonl"


class MetricsWriter:
    """Writes a run's metrics from `start` on; what an earlier run wrote beyond it is dropped.

    What the local disk does not take is a `UserError`.
    """

    def __init__(self, run: Path, start: int, steps: int, log_every: int):
        kept = [line for line in read(run / _NAME) if line["step"] <= start]
        self._mirror = Mirror(run)
        path = self._mirror.local / _NAME
        # Put in place at once: a kill here loses nothing.
        storage.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._local = self._mirror.local
        folder = self._local / "tensorboard"
        with storage.writing(self._local):
            self._file = open(path, "a", encoding="utf-8", buffering=1)  # a line at a time  # noqa: SIM115
            self._board = SummaryWriter(str(folder), purge_step=start + 1)
        self._boarder = self._board.file_writer.event_writer._worker
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=None, smoothing=0.05)
        self._first, self._steps, self._every = start + 1, steps, log_every
        self._since: list[tuple[float, float]] = []  # (tokens, seconds) of steps since a line
        self._speed = ""

    def write(self, step: int, values: dict[str, float]) -> None:
        """The metrics of a training step."""
        self._record(step, values)
        if step == self._first:  # mostly compilation, and so part of no mean
            self._speed = f"first step {values['seconds']:.1f} s"
        else:
            self._since.append((values["weight"], values["seconds"]))
        due = step % self._every == 0 or step == self._steps
        if due and self._since:
            self._speed, self._since = self._mean_speed(step), []
        brief = (
            f"loss {values['loss']:.3f}  grad {values['grad_norm']:.2f}"
            f"  lr {values['learning_rate']:.2e}  {self._speed}"
        )
        self._bar.set_postfix_str(brief, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable and due:
            self.say(f"step {step}  {brief}")

    def _mean_speed(self, step: int) -> str:
        """Of the steps since the last line; the bar itself says what is left."""
        tokens, seconds = map(sum, zip(*self._since, strict=True))
        speed = f"{tokens / seconds:,.0f} tok/s"
        if not self._bar.disable or step == self._steps:
            return speed
        left = (self._steps - step) * seconds / len(self._since)
        return f"{speed}  {tqdm.format_interval(left)} left"

    def write_eval(self, step: int, values: dict[str, float]) -> None:
        """The metrics of an evaluation."""
        self._record(step, {f"eval_{k}": v for k, v in values.items()})
        brief = f"step {step}  held-out loss {values['loss']:.4f}"
        if "bits_per_byte" in values:
            brief += f"  bits per byte {values['bits_per_byte']:.4f}"
        self.say(brief)

    def say(self, line: str) -> None:
        """A line on stderr that leaves the progress bar whole."""
        say(line)

    def _record(self, step: int, values: dict[str, float]) -> None:
        with storage.writing(self._local / _NAME):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._check_board()
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def _check_board(self) -> None:
        # A full disk ends tensorboardX's thread, and its queue, once full, would block for ever.
        if not self._boarder.is_alive():
            raise UserError(f"{self._local / 'tensorboard'}: not writable, see above; disk full?")

    def sync(self) -> None:
        """Where the run is a URL: copies everything there now, as at a checkpoint.

        What the store does not take is said, and is tried again later.
        """
        with storage.writing(self._local):
            self._check_board()
            self._board.flush()
        self._mirror.try_sync()

    def close(self) -> None:
        """Flushes everything."""
        self._bar.close()
        with contextlib.ExitStack() as stack:
            stack.callback(self._mirror.close)
            stack.enter_context(storage.writing(self._local))
            stack.callback(self._file.close)
            self._check_board()
            self._board.close()


class NoMetricsWriter:
    """`MetricsWriter` of a process that does not lead: another one writes them."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def write_eval(self, step: int, values: dict[str, float]) -> None: ...

    def say(self, line: str) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that was cut off by a kill is left out."""
    try:
        text = storage.read_text(path)
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
