"""Tables of text for stdout."""

from collections.abc import Container, Sequence


def table(rows: Sequence[Sequence[str]], left: Container[int] = (0,), indent: str = "") -> str:
    """The rows as lines, their columns aligned and two spaces apart.

    All rows have the same number of cells; the first row may be the head. The columns `left` are
    left-aligned, the others right-aligned. `indent` begins each line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"{indent}{'  '.join(cells)}".rstrip()

    return "\n".join(map(line, rows))
