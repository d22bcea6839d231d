"""What splitting makes of a corpus, in numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from klong_jax.core.trajectory import Window
from klong_jax.kernels.limits import MOST_SEGMENTS
from klong_jax.splitting.packing import pack
from klong_jax.splitting.plan import TrajectoryPlan


@dataclass(frozen=True)
class Spread:
    """A quantity over the members of a corpus.

    Attributes:
        total: Its sum.
        median: Half of the members have at most this.
        p90: Nine tenths of them have at most this.
        largest: The largest.
    """

    total: int
    median: int
    p90: int
    largest: int

    @staticmethod
    def of(values: Iterable[int]) -> "Spread":
        """The spread of at least one value; quantiles are values that occur."""
        array = np.fromiter(values, np.int64)
        median, p90 = np.percentile(array, [50, 90], method="inverted_cdf")
        return Spread(int(array.sum()), int(median), int(p90), int(array.max()))


@dataclass(frozen=True)
class CorpusStats:
    """A split corpus.

    Attributes:
        trajectories: How many there are.
        turns: Assistant turns of a trajectory.
        tokens: Tokens of a trajectory, each counted once.
        windows: Windows of a trajectory.
        window_tokens: Tokens of a window.
        rows_of: Tokens that a row of a batch has.
        packed_rows: How many rows the windows take if short ones share them.
        prefix_tokens: Pinned tokens, counted in every window.
        faded_tokens: Tokens left out of environment texts that windows carry over.
        trained_tokens: Tokens that are trained.
        cut_turns: Turns whose environment text was shortened to fit.
        cut_tokens: Environment tokens left out by that.
        dropped_turns: Turns that no window shows.
        dropped_tokens: All their tokens.
        untrained_tokens: Those of them that the assistant said.
    """

    trajectories: int
    turns: Spread
    tokens: Spread
    windows: Spread
    window_tokens: Spread
    rows_of: int
    packed_rows: int
    prefix_tokens: int
    faded_tokens: int
    trained_tokens: int
    cut_turns: int
    cut_tokens: int
    dropped_turns: int
    dropped_tokens: int
    untrained_tokens: int

    @property
    def padding_share(self) -> float:
        """Padding of all computed positions if each window has a row of its own."""
        return 1 - self.window_tokens.total / (self.windows.total * self.rows_of)

    @property
    def packed_padding_share(self) -> float:
        """The same if short windows share rows."""
        return 1 - self.window_tokens.total / (self.packed_rows * self.rows_of)

    @property
    def trained_share(self) -> float:
        """Trained tokens of all tokens in windows."""
        return self.trained_tokens / self.window_tokens.total

    @property
    def prefix_share(self) -> float:
        """Pinned tokens of all tokens in windows."""
        return self.prefix_tokens / self.window_tokens.total


def corpus_stats(plans: Sequence[TrajectoryPlan], limit: int) -> CorpusStats:
    """Sums up at least one plan, made for a context of so many tokens."""
    windows = [window for plan in plans for window in plan.windows]
    trained = sum(plan.trained_tokens for plan in plans)
    return CorpusStats(
        trajectories=len(plans),
        turns=Spread.of(plan.turns for plan in plans),
        tokens=Spread.of(plan.stream_tokens for plan in plans),
        windows=Spread.of(len(plan.windows) for plan in plans),
        window_tokens=Spread.of(window.length for window in windows),
        rows_of=limit,
        packed_rows=len(pack([window.length for window in windows], limit, MOST_SEGMENTS)),
        prefix_tokens=sum(window.prefix_tokens for window in windows),
        faded_tokens=sum(window.faded_tokens for window in windows),
        trained_tokens=trained,
        cut_turns=sum(len(plan.cut_turns) for plan in plans),
        cut_tokens=sum(plan.cut_tokens for plan in plans),
        dropped_turns=sum(plan.dropped_turns for plan in plans),
        dropped_tokens=sum(plan.dropped_tokens for plan in plans),
        untrained_tokens=sum(plan.output_tokens for plan in plans) - trained,
    )


class TrainedByPosition:
    """The share of tokens that are trained, by where they stand in their window."""

    def __init__(self, limit: int, bins: int = 50) -> None:
        """Starts empty.

        Args:
            limit: Tokens of the longest window.
            bins: Into how many stretches of positions it is cut, at most.
        """
        self._width = -(-limit // bins)
        self._seen = np.zeros(-(-limit // self._width), np.int64)
        self._trained = np.zeros_like(self._seen)

    def add(self, windows: Iterable[Window]) -> None:
        """Counts the tokens of windows."""
        for window in windows:
            place = np.arange(len(window.tokens)) // self._width
            self._seen += np.bincount(place, minlength=len(self._seen))
            self._trained += np.bincount(place[window.trained_mask], minlength=len(self._seen))

    def points(self) -> tuple[tuple[float, float], ...]:
        """(middle of a stretch, trained share there), as far as windows reach."""
        return tuple(
            ((index + 0.5) * self._width, float(trained / seen))
            for index, (seen, trained) in enumerate(zip(self._seen, self._trained, strict=True))
            if seen
        )
