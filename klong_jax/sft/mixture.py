"""Mixtures of sources: what is drawn at a position follows from the seed and the position alone.

So a checkpoint has to remember a position only, and any number of hosts draw the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from math import gcd, lcm

import numpy as np

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import content_hash

# Draws between two states of the schedule that are kept.
_STRIDE = 1024


@dataclass(frozen=True)
class Source:
    """One source of a mixture, with either a weight or epochs.

    Attributes:
        name: How it is called; part of what decides its order.
        size: Units it holds: windows, or groups of windows that stay together.
        weight: Its part of the draws that sources with epochs leave, relative to other weights.
        epochs: How often each of its units is drawn; need not be whole.
    """

    name: str
    size: int
    weight: float | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise UserError(f"mixture: {self.name} holds nothing to train on; leave it out.")
        if (self.weight is None) == (self.epochs is None):
            raise UserError(f"mixture: give {self.name} either a weight or epochs.")
        if (self.weight or self.epochs or 0) <= 0:
            raise UserError(
                f"mixture: the weight or epochs of {self.name} must be positive; raise it or leave "
                "the source out."
            )


@dataclass(frozen=True)
class Draw:
    """What stands at a position of a mixture.

    Attributes:
        source: Number of the source.
        epoch: How often all of the source was drawn before.
        index: Which of the source's units.
    """

    source: int
    epoch: int
    index: int


class Mixture:
    """Units of several sources in one order: shares are kept at every prefix, epochs are shuffled.

    Up to every position each source was drawn its share of times, give or take less than one; each
    epoch of a source is a permutation of its units.
    """

    def __init__(self, sources: Sequence[Source], units: int | None, seed: int) -> None:
        """Plans a mixture.

        Args:
            sources: What is mixed.
            units: Draws in all; None where every source has epochs, which say it.
            seed: Seeds the order within sources.

        Raises:
            UserError: Two sources share a name, or weights, epochs and units contradict each other.
        """
        names = [source.name for source in sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"mixture: two sources are called {twice}; rename one.")
        self.sources = tuple(sources)
        self._shares = _shares(self.sources, units)
        self._units = sum(self._shares) if units is None else units
        common = gcd(*self._shares)
        self._shares = tuple(share // common for share in self._shares)
        self._seed = seed
        # The state of the schedule at every stride: how often each source was drawn. A dict, so
        # that threads that replay the same stretch write the same.
        self._states = {0: (0,) * len(self.sources)}
        self._stretch = lru_cache(2)(self._draw_stretch)
        # An epoch ends where the next begins, so a batch may need two of each source.
        self._order = lru_cache(2 * len(self.sources))(self._permutation)

    def __len__(self) -> int:
        return self._units

    def at(self, position: int) -> Draw:
        """What is drawn at a position; beyond the end it goes on in the same way."""
        # Shares are whole numbers, so after their sum every count is exact and all begins anew.
        period, place = divmod(position, sum(self._shares))
        stretch, within = divmod(place, _STRIDE)
        source, count = self._stretch(stretch)[within]
        count += period * self._shares[source]
        epoch, index = divmod(count, self.sources[source].size)
        return Draw(source, epoch, int(self._order(source, epoch)[index]))

    def _draw_stretch(self, number: int) -> list[tuple[int, int]]:
        """The draws of one stride; the first time, those before it are replayed."""
        while True:
            begin = min(number, len(self._states) - 1)
            counts = list(self._states[begin])
            drawn = list(islice(schedule(self._shares, counts), _STRIDE))
            self._states[begin + 1] = tuple(counts)
            if begin == number:
                return drawn

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        name = int(content_hash(self.sources[source].name)[:16], 16)
        rng = np.random.default_rng([self._seed, name, epoch])
        return rng.permutation(self.sources[source].size)


def schedule(shares: Sequence[int], counts: list[int]) -> Iterator[tuple[int, int]]:
    """Draws sources so that each has its share of every prefix, give or take less than one.

    This is Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980),
    whose bound 1 - 1/(2n - 2) no other rule betters: of the sources that lag far enough to be drawn
    now, the one whose draw is due first.

    Args:
        shares: Whole numbers in proportion to the shares.
        counts: How often each source was drawn; brought up to date.

    Yields:
        The source, and how often it was drawn before.
    """
    total, scale = sum(shares), max(1, 2 * len(shares) - 2)
    position = sum(counts)
    while True:
        position += 1
        best, due = -1, 0
        for source, share in enumerate(shares):
            # How much less than its share it had, in units of 1 / (total * scale).
            lag = scale * (share * position - counts[source] * total)
            if lag < total:
                continue
            slack = ((scale - 1) * total - lag) // (share * scale)
            if best < 0 or slack < due:
                best, due = source, slack
        counts[best] += 1
        yield best, counts[best] - 1


def _shares(sources: Sequence[Source], units: int | None) -> tuple[int, ...]:
    """Whole numbers in proportion to how often each source is drawn."""
    fixed = [max(1, round(s.size * s.epochs)) if s.epochs else 0 for s in sources]
    weights = [Fraction(repr(s.weight)) if s.weight is not None else Fraction() for s in sources]
    if units is None:
        if any(weights):
            raise UserError(
                "mixture: weights share out a number of draws; give steps, or epochs to every "
                "source."
            )
        return tuple(fixed)
    if not any(weights):
        raise UserError(
            f"mixture: epochs of every source make {sum(fixed)} draws by themselves; leave out "
            "steps, or give a source a weight."
        )
    rest = units - sum(fixed)
    if rest <= 0:
        raise UserError(
            f"mixture: epochs take {sum(fixed)} of {units} draws and leave none to weights; lower "
            "them or take more steps."
        )
    parts = [
        Fraction(share) + weight / sum(weights) * rest
        for share, weight in zip(fixed, weights, strict=True)
    ]
    whole = lcm(*(part.denominator for part in parts))
    return tuple(int(part * whole) for part in parts)
