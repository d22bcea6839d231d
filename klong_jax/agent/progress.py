"""How far the agent has come, read off what its commands print.

An estimate, for reports only: nothing is rewarded or decided by it. It never goes back, since a
line that says less than an earlier one is about a part, or about a repair.
"""

import re

_TOTAL = re.compile(r"\b1 to (\d+)")
_DONE = re.compile(r"^all (?:done|passed|finished)\b", re.MULTILINE | re.IGNORECASE)
_OK = re.compile(r"^ok (\d+)\b", re.MULTILINE)
_NEXT = re.compile(r"^next (\d+)\b", re.MULTILINE)
_RATIO = re.compile(r"(?<![\d/.])(\d{1,6}) ?(?:/|of) ?(\d{1,6})(?![\d/.])")
_PERCENT = re.compile(r"(?<![\d.])(\d{1,3}(?:\.\d+)?) ?%")


class Progress:
    """The estimate of one rollout.

    Attributes:
        points: (assistant turn, estimate in [0, 1]) wherever the estimate rose.
    """

    def __init__(self, instructions: str) -> None:
        """Looks in the instructions for how many steps there are ("1 to 40", the last one)."""
        totals = [int(total) for total in _TOTAL.findall(instructions)]
        self._total = totals[-1] if totals else 0
        self.points: list[tuple[int, float]] = []

    @property
    def estimate(self) -> float | None:
        """The highest estimate so far, or None if nothing told."""
        return self.points[-1][1] if self.points else None

    def feed(self, turn: int, output: str) -> None:
        """Reads the output of a command."""
        found = self._parse(output[-10_000:])
        if found is not None and found > (self.estimate or -1.0):
            self.points.append((turn, found))

    def _parse(self, output: str) -> float | None:
        if _DONE.search(output):
            return 1.0
        found = [float(value) / 100 for value in _PERCENT.findall(output)]
        found += [int(a) / int(b) for a, b in _RATIO.findall(output) if int(b)]
        if self._total:
            found += [int(done) / self._total for done in _OK.findall(output)]
            found += [(int(coming) - 1) / self._total for coming in _NEXT.findall(output)]
        sane = [value for value in found if 0.0 <= value <= 1.0]
        return max(sane, default=None)
