"""Progress of long work on stderr: lines, and a bar of bytes or of another unit."""

import sys
import time

from tqdm import tqdm


def say(line: str) -> None:
    """A line on stderr, above the bar if there is one.

    Written as one, so that what a signal says cannot come before the line's end.
    """
    tqdm.write(f"{line}\n", file=sys.stderr, end="")


class Progress:
    """A bar when stderr is a terminal, a plain line now and then when not."""

    def __init__(self, title: str, total: int | None, quiet: bool = False, unit: str = "B"):
        """`total` is in units; None if it is not known. `quiet`: another process speaks."""
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
        """So many units more are done."""
        self._done += size
        self._bar.update(size)
        if self._bar.disable and time.monotonic() - self._told > 10:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        if self._quiet:
            return
        of = f" of {self._total / 1e6:.1f}" if self._total else ""
        rate = self._done / 1e6 / max(1e-9, self._told - self._began)
        say(f"{self._title}: {self._done / 1e6:.1f}{of} M{self._unit}, {rate:.3g} M{self._unit}/s")
