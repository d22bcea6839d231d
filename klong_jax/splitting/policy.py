"""The context policy: what the model sees at each turn.

A window is the pinned prefix followed by the most recent turns. When the next turn would not fit,
the oldest unpinned turns go, down to an overlap, and a new window starts. The agent runs this
policy online and the splitter runs it over a recording, with the same code, so that the windows of
trajectory-splitting SFT are exactly the contexts the agent will meet (KLong, arXiv 2602.17547,
section 3; the overlap and the truncation of history are the paper's).

Positions are indices into the trajectory's token stream (see `klong_jax.core.trajectory`).
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field

from klong_jax.core.errors import UserError
from klong_jax.core.trajectory import Turn, WindowSpan


class ContextOverflow(UserError):
    """A single turn does not fit beside the pinned prefix."""


@dataclass(frozen=True)
class ContextPolicy:
    """The three numbers of the policy, all in tokens.

    Attributes:
        limit: Longest context the model may see, its output included.
        overlap: Most history carried over when a new window starts.
        reserve: Room kept for the next output: what the agent may generate in one turn.
    """

    limit: int
    overlap: int
    reserve: int

    def __post_init__(self) -> None:
        if min(self.limit, self.reserve) <= 0 or self.overlap < 0:
            raise UserError(
                "splitting: context_limit and reserve must be positive and overlap at least 0, "
                f"not {self.limit}, {self.reserve} and {self.overlap}."
            )
        if self.overlap + self.reserve >= self.limit:
            raise UserError(
                f"splitting: overlap + reserve ({self.overlap} + {self.reserve}) must be smaller "
                f"than context_limit ({self.limit}); lower one of them or raise the limit."
            )

    def check_prefix(self, prefix_len: int, where: str) -> None:
        """Refuses a pinned prefix that leaves no room for a turn.

        Raises:
            UserError: Names the trajectory or task and the limit that would do.
        """
        if prefix_len + self.reserve >= self.limit:
            raise UserError(
                f"{where}: the pinned prefix has {prefix_len} tokens, which with a reserve of "
                f"{self.reserve} does not fit into splitting.context_limit={self.limit}; "
                f"raise it above {prefix_len + self.reserve}."
            )

    def longest_suffix(self, prefix_len: int) -> int:
        """Most environment tokens that one turn can show beside the prefix."""
        return self.limit - prefix_len - self.reserve


@dataclass
class WindowTracker:
    """Follows a trajectory turn by turn and decides where each window begins.

    Attributes:
        policy: The numbers.
        prefix_len: Pinned tokens at the front of the stream.
        closed: Windows that will not grow any more.
    """

    policy: ContextPolicy
    prefix_len: int
    closed: list[WindowSpan] = field(default_factory=list)
    _keep_from: int = field(init=False)
    _fresh_from: int = 0
    _end: int = 0
    _starts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._keep_from = self.prefix_len

    def fork(self) -> "WindowTracker":
        """A tracker that goes on from here by itself, for a turn that may not come about."""
        other = copy(self)
        other.closed, other._starts = list(self.closed), list(self._starts)
        return other

    @property
    def keep_from(self) -> int:
        """Where the current window's history begins."""
        return self._keep_from

    @property
    def uncut(self) -> bool:
        """Whether the first window still holds everything."""
        return not self.closed

    def open_turn(self, start: int, suffix_end: int, output_len: int = 0) -> int:
        """Places the next turn.

        Args:
            start: Where the turn's suffix starts (or the prefix ends, if later).
            suffix_end: Where its suffix ends and its output begins.
            output_len: The output's length where it is known already.

        Returns:
            Where the history of the turn's window begins: the context is
            `stream[:prefix_len] + stream[that:suffix_end]`.

        Raises:
            ContextOverflow: The turn does not fit even without any history.
        """
        need = max(self.policy.reserve, output_len)

        def fits(keep_from: int) -> bool:
            return self.prefix_len + suffix_end - keep_from + need <= self.policy.limit

        if not fits(self._keep_from):
            kept = [s for s in self._starts if start - s <= self.policy.overlap and fits(s)]
            if not kept and not fits(start):
                raise ContextOverflow(
                    f"a turn of {suffix_end - start + need} tokens does not fit beside a pinned "
                    f"prefix of {self.prefix_len} in a context of {self.policy.limit}; raise "
                    "splitting.context_limit or shorten the turn."
                )
            self._close()
            self._keep_from, self._fresh_from = min(kept, default=start), start
        self._starts.append(start)
        return self._keep_from

    def close_turn(self, end: int) -> None:
        """Tells where the turn's output ended."""
        self._end = end

    def pin(self, prefix_len: int) -> None:
        """Extends the pinned prefix over what has been read; only before the first cut.

        Raises:
            ValueError: A window has been cut already, so its siblings would differ.
        """
        if not self.uncut:
            raise ValueError("the prefix cannot grow after a window has been cut")
        self.prefix_len = self._keep_from = prefix_len
        self._end = max(self._end, prefix_len)
        self._starts = [start for start in self._starts if start >= prefix_len]

    def spans(self) -> tuple[WindowSpan, ...]:
        """All windows so far, the growing one last."""
        return (*self.closed, self._current())

    def _current(self) -> WindowSpan:
        return WindowSpan(
            self.prefix_len, self._keep_from, self._fresh_from, max(self._end, self._keep_from)
        )

    def _close(self) -> None:
        self.closed.append(self._current())


def split(turns: Sequence[Turn], prefix_len: int, policy: ContextPolicy) -> tuple[WindowSpan, ...]:
    """Replays the policy over recorded turns.

    Args:
        turns: The recording; suffixes longer than `policy.longest_suffix` are refused.
        prefix_len: Pinned tokens at the front of the stream.
        policy: The numbers.

    Returns:
        The windows in order: every output token is trained in exactly one of them.

    Raises:
        UserError: The prefix or a turn does not fit; the message names the turn.
    """
    lengths = ((len(turn.suffix_ids), len(turn.output_ids)) for turn in turns)
    return split_lengths(lengths, prefix_len, policy)


def split_lengths(
    lengths: Iterable[tuple[int, int]], prefix_len: int, policy: ContextPolicy
) -> tuple[WindowSpan, ...]:
    """`split` of turns of which only the lengths of suffix and output are known."""
    tracker = WindowTracker(policy, prefix_len)
    position = 0
    for number, (suffix_len, output_len) in enumerate(lengths):
        suffix_end = position + suffix_len
        end = suffix_end + output_len
        if end > prefix_len:
            try:
                tracker.open_turn(max(position, prefix_len), suffix_end, output_len)
            except ContextOverflow as overflow:
                raise UserError(f"turn {number}: {overflow}") from None
        tracker.close_turn(end)
        position = end
    return tracker.spans()
