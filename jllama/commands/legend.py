"""A figure's legend: below the panels, so that it never covers a curve."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

_WIDTH = 0.075  # inches of a letter, in the legend's font
_LINE = 0.2  # inches of a row


def draw_legend(figure: Figure, lines: Mapping[str, Any]) -> None:
    """Draws the legend of `lines` by label, and makes the figure, of constrained layout, taller."""
    if not lines:
        return
    width, height = figure.get_size_inches()
    columns = int(width / (_WIDTH * max(map(len, lines)) + 0.6))
    columns = max(1, min(columns, len(lines)))
    figure.set_size_inches(width, height + _LINE * (2 - (-len(lines) // columns)))
    # A label may begin with _, which matplotlib hides, or hold $, which would begin a formula.
    legend = figure.legend(
        list(lines.values()),
        [""] * len(lines),
        loc="outside lower center",
        ncols=columns,
        fontsize="small",
    )
    for text, label in zip(legend.get_texts(), lines, strict=True):
        text.set_parse_math(False)
        text.set_text(label)
