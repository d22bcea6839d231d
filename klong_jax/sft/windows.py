"""The windows of a tokenised corpus, by number, each cut from the disk when it is asked for."""

from collections.abc import Callable

import numpy as np

from klong_jax.core.errors import UserError
from klong_jax.core.trajectory import Window, WindowSpan
from klong_jax.sft.corpus import StoredTrajectory, TokenCorpus
from klong_jax.splitting.policy import ContextPolicy, split_lengths


def stored_spans(trajectory: StoredTrajectory, policy: ContextPolicy) -> tuple[WindowSpan, ...]:
    """Splits a stored trajectory; its tokens are not touched.

    Raises:
        UserError: The pinned prefix or a turn does not fit; names the recording.
    """
    policy.check_prefix(trajectory.prefix_len, trajectory.source)
    try:
        return split_lengths(trajectory.turn_lengths.tolist(), trajectory.prefix_len, policy)
    except UserError as error:
        raise UserError(f"{trajectory.source}: {error}") from None


def cut_stored(trajectory: StoredTrajectory, index: int, span: WindowSpan) -> Window:
    """Cuts one window out of a stored trajectory; only its own tokens are read.

    Demonstrations know no policy that sampled them: log-probabilities are zero, and the version is
    0 where the assistant spoke.
    """
    # Of environment and assistant by turns, the ends in the stream.
    edges = np.cumsum(trajectory.turn_lengths.reshape(-1))
    speaks = np.arange(len(edges)) % 2 == 1

    def sampled(start: int, end: int) -> np.ndarray:
        inside = np.clip(edges, start, end)
        return np.repeat(speaks, np.diff(inside, prepend=start))

    pieces = ((0, span.prefix_len), (span.keep_from, span.end))
    spoken = np.concatenate([sampled(start, end) for start, end in pieces])
    position = np.r_[0 : span.prefix_len, span.keep_from : span.end]
    return Window(
        index=index,
        prefix_len=span.prefix_len,
        tokens=np.concatenate([trajectory.tokens[start:end] for start, end in pieces]),
        trained_mask=spoken & (position >= span.fresh_from),
        behaviour_logprobs=np.zeros(len(position), np.float32),
        policy_version=np.where(spoken, 0, -1).astype(np.int32),
    )


class CorpusWindows:
    """All windows of a corpus under one context policy; those of one trajectory stand together.

    Of each window four numbers are kept, and its trajectory's.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        policy: ContextPolicy,
        *,
        on_skip: Callable[[str], None] | None = None,
    ) -> None:
        """Splits every trajectory.

        Args:
            corpus: The trajectories.
            policy: The context policy.
            on_skip: Told of trajectories that do not fit; None raises instead.

        Raises:
            UserError: A trajectory does not fit and nobody is told, or none fits.
        """
        rows: list[tuple[int, int, int, int, int]] = []
        first = [0]
        for number in range(len(corpus)):
            try:
                spans = stored_spans(corpus.trajectory(number), policy)
            except UserError as error:
                if on_skip is None:
                    raise
                on_skip(str(error))
                spans = ()
            rows += [(number, s.prefix_len, s.keep_from, s.fresh_from, s.end) for s in spans]
            first.append(len(rows))
        if not rows:
            raise UserError(
                f"{corpus.trajectory(0).source}: neither this trajectory nor another of its file "
                f"fits into splitting.context_limit={policy.limit}; raise it."
            )
        self.corpus = corpus
        self._rows = np.array(rows, np.int64)
        self._first = np.array(first)

    def __len__(self) -> int:
        return len(self._rows)

    def window(self, number: int) -> Window:
        """One of the windows, read from disk."""
        trajectory, *span = self._rows[number].tolist()
        index = number - int(self._first[trajectory])
        return cut_stored(self.corpus.trajectory(trajectory), index, WindowSpan(*span))

    def groups(self, most: int) -> np.ndarray:
        """Cuts the windows into groups that share a pinned prefix.

        Args:
            most: Most windows of a group.

        Returns:
            int64[groups, 2], the first window of each group and the one after its last: a
            trajectory's consecutive windows, `most` at a time.
        """
        cuts = [
            (start, min(start + most, end))
            for first, end in zip(self._first[:-1].tolist(), self._first[1:].tolist(), strict=True)
            for start in range(first, end, most)
        ]
        return np.array(cuts, np.int64)
