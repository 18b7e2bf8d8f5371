"""Figures of progress are told in units of their size, and silent work says how long it takes."""

import re
import time

import pytest

from jllama.progress import Progress, waiting


@pytest.mark.parametrize(
    ("total", "unit", "said"),
    [
        (11_700_000, "B", "x: 11.7 of 11.7 MB, "),
        (458_355, "B", "x: 458.4 of 458.4 kB, "),
        (55, " tokens", "x: 55 of 55 tokens, "),
        (999_600, " tokens", "x: 1.0 of 1.0 M tokens, "),
    ],
)
def test_figures_have_the_unit_of_their_size(total, unit, said, capsys):
    with Progress("x", total, unit=unit) as progress:
        progress.advance(total)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
    assert re.search(rf", [\d.]+ [Mk]?{unit}/s$|, [\d.e+]+ M{unit}/s$", line)


def test_silent_work_says_how_long_it_takes_and_stops_saying_so(capsys):
    with pytest.raises(ZeroDivisionError), waiting("compiling", every=0.05):
        time.sleep(0.3)
        raise ZeroDivisionError
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and set(lines) == {"compiling: 0 s until now"}
    time.sleep(0.15)
    assert not capsys.readouterr().err
