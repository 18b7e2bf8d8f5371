"""Shows the progress of long work on stderr: lines, and a bar of bytes or of another unit."""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm


def say(line: str) -> None:
    """Prints a line on stderr, above the bar if there is one.

    The line and its end are one write, so that a signal's message cannot come between them.
    """
    tqdm.write(f"{line}\n", file=sys.stderr, end="")


@functools.cache
def note(line: str) -> None:
    """Says a line that begins with "note: ", once in a process however often it is asked to."""
    say(f"note: {line}")


@contextlib.contextmanager
def waiting(what: str, every: float = 30.0) -> Iterator[None]:
    """Says every 30 seconds how long `what`, which has no measure of progress, has taken."""
    began, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(every):
            say(f"{what}: {time.monotonic() - began:.0f} s until now")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Progress:
    """A bar if stderr is a terminal, else a line every ten seconds and at the end."""

    def __init__(self, title: str, total: int | None, quiet: bool = False, unit: str = "B"):
        """`total`: in units, or None if unknown. `quiet`: prints nothing; another process does."""
        self._quiet, self._unit = quiet, unit
        self._title, self._done, self._total = title, 0, total
        self._began = self._told = time.monotonic()

    def __enter__(self):
        self._bar = tqdm(
            total=self._total,
            desc=self._title,
            unit=self._unit,
            unit_scale=True,
            disable=self._quiet or None,
        )
        return self

    def __exit__(self, *_):
        self._bar.close()
        if self._bar.disable:
            self._tell()

    def advance(self, size: int) -> None:
        """Adds `size` units to those that are done."""
        self._done += size
        self._bar.update(size)
        if self._bar.disable and time.monotonic() - self._told > 10:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        if self._quiet:
            return
        scale, unit, digits = self._scaled(max(self._done, self._total or 0))
        of = f" of {self._total / scale:.{digits}f}" if self._total else ""
        rate = self._done / max(1e-9, self._told - self._began)
        rate_scale, rate_unit, _ = self._scaled(rate)
        say(
            f"{self._title}: {self._done / scale:.{digits}f}{of} {unit},"
            f" {rate / rate_scale:.3g} {rate_unit}/s"
        )

    def _scaled(self, largest: float) -> tuple[float, str, int]:
        """The unit in which a figure is told, its name, and the decimals."""
        for scale, letter in ((1e6, "M"), (1e3, "k")):
            if largest >= 0.9995 * scale:
                return scale, f"{letter}{self._unit}", 1
        return 1, self._unit.strip(), 0
