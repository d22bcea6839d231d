"""Numbers as a reader wants them."""

from collections.abc import Mapping

NOTHING = "–"


def number(value: float | None, digits: int = 2) -> str:
    """A number with a fixed number of decimals; a dash for None."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share as whole percent; a dash for None."""
    return NOTHING if value is None else f"{100 * value:.0f}%"


def seconds(value: float | None) -> str:
    """A duration in its natural unit; a dash for None."""
    if value is None:
        return NOTHING
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{value / 60:.1f} min"
    return f"{value / 3600:.1f} h"


def counts(values: Mapping[str, int]) -> str:
    """Categories with their counts; a dash for none."""
    return ", ".join(f"{name} {count}" for name, count in values.items() if count) or NOTHING
