"""Which windows share a row, so that little of what is computed is padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int, most: int) -> list[list[int]]:
    """Puts windows into rows by best fit, long ones first (Johnson 1973).

    Each goes into the fullest row that still holds it. The rows follow from the lengths alone.

    Args:
        lengths: Tokens of each window; those without any are in no row.
        capacity: Tokens of a row.
        most: Windows of a row at most.

    Returns:
        The numbers of each row's windows; at least one row.

    Raises:
        ValueError: A window is longer than a row.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # Tokens left and the row's number, in order.
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        if length > capacity:
            raise ValueError(f"a window of {length} tokens does not fit into a row of {capacity}")
        if length == 0:
            break
        found = bisect_left(open_rows, (length, 0))
        left, row = open_rows.pop(found) if found < len(open_rows) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        if left > length and len(rows[row]) < most:
            insort(open_rows, (left - length, row))
    return rows or [[]]
