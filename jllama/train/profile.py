"""The xprof trace of some steps of a run."""

from pathlib import Path

import jax

from jllama.files.mirror import Mirror
from jllama.parallel import distributed


class Profile:
    """Traces the steps that `run.profile` names; process 0 writes the trace to RUN/profile."""

    def __init__(self, steps: str, end: int, run: Path):
        """`steps` is "FROM:TO", which traces the steps FROM to TO - 1, counted from 0; or "".

        `end` is the number of steps that the run takes: a trace ends with it. A run that resumes
        after FROM traces nothing.
        """
        first, last = map(int, (steps or "-1:-1").split(":"))
        self._named, self._steps = steps, end
        self._first, self._end = first, min(last, end)
        self._folder = run / "profile"
        self._files: Mirror | None = None  # while a trace is being taken

    def note(self, step: int) -> str:
        """What to say before `step` of steps that are not traced, though they were asked for."""
        if not self._named:
            return ""
        where = f"the run goes from step {step} to step {self._steps}"
        if not step <= self._first < self._steps:
            return f"note: run.profile={self._named} traces nothing: {where}"
        if int(self._named.partition(":")[2]) > self._steps:
            return f"note: run.profile={self._named} traces up to step {self._steps}: {where}"
        return ""

    def begins_at(self, step: int) -> bool:
        """Whether the trace begins before this step."""
        return step == self._first

    def ends_at(self, step: int) -> bool:
        """Whether the trace that is being taken ends before this step."""
        return self._files is not None and step == self._end

    def start(self) -> None:
        """Begins to trace in process 0."""
        if distributed.leader():
            self._files = Mirror(self._folder)
            jax.profiler.start_trace(str(self._files.local))

    def stop(self) -> None:
        """Writes the trace; does nothing when none is being taken."""
        if self._files is not None:
            jax.profiler.stop_trace()
            self._files.close()
            self._files = None
