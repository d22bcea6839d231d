"""Text for a terminal: tables and spans of time."""

from __future__ import annotations

from collections.abc import Sequence


def span(seconds: float) -> str:
    """A time in the largest unit that tells enough, such as "5 min"."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of text, their columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
