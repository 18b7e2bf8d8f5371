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

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Writes the metrics of a run to its folder and, in short, to stderr.

    Raises `UserError` when the local disk cannot be written.
    """

    def __init__(self, run: Path, start: int, steps: int, log_every: int):
        """Goes on after step `start` of `steps`; lines of later steps in the folder are dropped.

        Every `log_every` steps a line goes to stderr, unless a progress bar is shown there.
        """
        lines = [line for line in read(run / METRICS) if line["step"] <= start]
        self._last = lines[-1] if lines else {}
        self._mirror = Mirror(run)
        path = self._mirror.local / METRICS
        # The file is replaced as a whole: a kill here loses no line.
        storage.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._local = self._mirror.local
        folder = self._local / "tensorboard"
        with storage.writing(self._local):
            self._file = open(path, "a", encoding="utf-8", buffering=1)  # a line at a time  # noqa: SIM115
            self._board = SummaryWriter(str(folder), purge_step=start + 1)
        self._boarder = self._board.file_writer.event_writer._worker
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=None, smoothing=0.05)
        self._first, self._steps, self._every = start + 1, steps, log_every
        # (computed tokens, predicted ones, seconds) of each step since the last line on stderr
        self._since: list[tuple[float, float, float]] = []
        self._speed = ""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of a training step."""
        self._record(step, values)
        if step == self._first:  # most of it is compilation: it is left out of the mean speed
            self._speed = f"first step {values['seconds']:.1f} s"
        else:
            self._since.append((values["computed_tokens"], values["weight"], values["seconds"]))
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
        """The speed since the last line, and the time that is left, which a bar shows itself."""
        tokens, predicted, seconds = map(sum, zip(*self._since, strict=True))
        speed = f"{tokens / seconds:,.0f} tok/s"
        if predicted < 0.9 * tokens:  # of prompts, or of padding
            speed += f", {predicted / seconds:,.0f} predicted"
        if not self._bar.disable or step == self._steps:
            return speed
        left = (self._steps - step) * seconds / len(self._since)
        return f"{speed}  {tqdm.format_interval(left)} left"

    def write_eval(self, step: int, values: dict[str, float]) -> None:
        """Writes what `evaluate` returned."""
        named = {f"eval_{k}": v for k, v in values.items()}
        if self._last != {"step": step, **named}:  # a finished run that is started once more
            self._record(step, named)
        brief = f"step {step}  held-out loss {values['loss']:.4f}"
        if "bits_per_byte" in values:
            brief += f"  bits per byte {values['bits_per_byte']:.4f}"
        self.say(brief)

    def say(self, line: str) -> None:
        """Writes a line to stderr, above the progress bar."""
        say(line)

    def _record(self, step: int, values: dict[str, float]) -> None:
        with storage.writing(self._local / METRICS):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._check_board()
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def _check_board(self) -> None:
        # A full disk ends tensorboardX's thread. Its queue would then fill up, and block us.
        if not self._boarder.is_alive():
            raise UserError(f"{self._local / 'tensorboard'}: not writable, see above; disk full?")

    def sync(self) -> None:
        """Copies all files to the run's URL now; does nothing when the run's folder is local.

        A copy that fails is reported on stderr and tried again later.
        """
        with storage.writing(self._local):
            self._check_board()
            self._board.flush()
        self._mirror.try_sync()

    def close(self) -> None:
        """Writes what is buffered, and closes the files."""
        self._bar.close()
        with contextlib.ExitStack() as stack:
            stack.callback(self._mirror.close)
            stack.enter_context(storage.writing(self._local))
            stack.callback(self._file.close)
            self._check_board()
            self._board.close()


class NoMetricsWriter:
    """A `MetricsWriter` that writes nothing, for all processes but process 0."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def write_eval(self, step: int, values: dict[str, float]) -> None: ...

    def say(self, line: str) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, without a last line that a kill has cut off."""
    try:
        text = storage.read_text(path)
    except storage.NoSuchFile:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
