"""The windows of a tokenised corpus, in groups, cut from the disk when they are asked for."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from klong_jax.core.errors import UserError
from klong_jax.core.trajectory import Window, WindowSpan
from klong_jax.sft.corpus import StoredTrajectory, TokenCorpus
from klong_jax.splitting.policy import ContextPolicy, split_lengths
from klong_jax.training.batches import Group


def stored_spans(trajectory: StoredTrajectory, policy: ContextPolicy) -> tuple[WindowSpan, ...]:
    """Splits a stored trajectory; its tokens are not touched.

    Raises:
        UserError: The pinned prefix or a turn does not fit; names the recording.
    """
    policy.check_prefix(trajectory.prefix_len, trajectory.source)
    try:
        restarts = set(np.flatnonzero(trajectory.restarts).tolist())
        lengths = trajectory.turn_lengths.tolist()
        untrained = set(np.flatnonzero(~trajectory.trained).tolist())
        return split_lengths(lengths, trajectory.prefix_len, policy, restarts, untrained)
    except UserError as error:
        raise UserError(f"{trajectory.source}: {error}") from None


def cut_stored(trajectory: StoredTrajectory, index: int, span: WindowSpan) -> Window:
    """Cuts one window out of a stored trajectory; only its own tokens are read.

    Demonstrations know no policy that sampled them: log-probabilities are zero, and the version is
    0 where what the assistant said is trained somewhere.
    """
    position = span.positions()
    # The ends of what environment and assistant said in turn; a position lies before one of them.
    ends = np.cumsum(trajectory.turn_lengths.reshape(-1))
    turn, spoken = np.divmod(np.searchsorted(ends, position, side="right"), 2)
    spoken = (spoken == 1) & trajectory.trained[turn]
    return Window(
        index=index,
        prefix_len=span.prefix_len,
        tokens=span.take(trajectory.tokens, span.marker),
        trained_mask=spoken & (position >= span.fresh_from),
        behaviour_logprobs=np.zeros(len(position), np.float32),
        policy_version=np.where(spoken, 0, -1).astype(np.int32),
        end=span.end,
    )


class CorpusGroups(Sequence[Group]):
    """The groups of a corpus under one context policy, read from disk when they are asked for.

    A group is up to so many consecutive windows of one trajectory. Of each trajectory only the
    number of its windows is kept.

    Attributes:
        short: How many windows fill at most half of the context.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        policy: ContextPolicy,
        most: int,
        *,
        on_skip: Callable[[str], None] | None = None,
    ) -> None:
        """Splits every trajectory.

        Args:
            corpus: The trajectories.
            policy: The context policy.
            most: Most windows of a group.
            on_skip: Told of trajectories that do not fit; None raises instead.

        Raises:
            UserError: A trajectory does not fit and nobody is told, or none fits.
        """
        counts = []
        self.short = 0
        for number in range(len(corpus)):
            try:
                spans = stored_spans(corpus.trajectory(number), policy)
                counts.append(len(spans))
                self.short += sum(2 * span.length <= policy.limit for span in spans)
            except UserError as error:
                if on_skip is None:
                    raise
                on_skip(str(error))
                counts.append(0)
        if not any(counts):
            raise UserError(
                f"{corpus.trajectory(0).source}: neither this trajectory nor another of its file "
                f"fits into splitting.context_limit={policy.limit}; raise it."
            )
        self.corpus, self.policy, self._most = corpus, policy, most
        self._windows = np.array(counts)
        self._first = np.cumsum([0, *(-(-count // most) for count in counts)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(f"group {number} of {len(self)}")
        place = int(np.searchsorted(self._first, number, side="right")) - 1
        trajectory = self.corpus.trajectory(place)
        start = (number - int(self._first[place])) * self._most
        spans = stored_spans(trajectory, self.policy)[start : start + self._most]
        return tuple(
            cut_stored(trajectory, start + index, span) for index, span in enumerate(spans)
        )

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return int(self._windows.sum())

    def prefixes(self) -> Iterator[tuple[int, int]]:
        """Of each group the length of its pinned prefix and its number of windows."""
        for number, windows in enumerate(self._windows.tolist()):
            prefix_len = self.corpus.prefix_len(number)
            for start in range(0, windows, self._most):
                yield prefix_len, min(self._most, windows - start)

    def trains_before(self, length: int) -> bool:
        """Whether a token at the front of a trajectory, behind its first, is the assistant's."""
        for number in range(len(self.corpus)):
            trajectory = self.corpus.trajectory(number)
            ends = np.cumsum(trajectory.turn_lengths.reshape(-1)).reshape(-1, 2)[trajectory.trained]
            # An output that is no token long ends where it begins.
            if np.any((ends[:, 0] < length) & (ends[:, 1] > np.maximum(ends[:, 0], 1))):
                return True
        return False
