"""The context policy: what the model sees at each turn.

A window is the pinned prefix followed by the most recent turns. When the next turn would not fit,
the oldest unpinned turns go, down to an overlap, and a new window starts. The agent runs this
policy online and the splitter runs it over a recording, with the same code, so that the windows of
trajectory-splitting SFT are exactly the contexts the agent will meet (KLong, arXiv 2602.17547,
section 3; the overlap and the truncation of history are the paper's).

Positions are indices into the trajectory's token stream (see `klong_jax.core.trajectory`).
"""

from bisect import bisect_right
from collections.abc import Container, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise

from klong_jax.core.errors import UserError
from klong_jax.core.trajectory import Turn, WindowSpan

_Stretch = tuple[int, int]


class ContextOverflow(UserError):
    """A single turn does not fit beside the pinned prefix."""


@dataclass(frozen=True)
class ContextPolicy:
    """The numbers of the policy, in tokens where they do not say turns.

    Attributes:
        limit: Longest context the model may see, its output included.
        overlap: Most history carried over when a new window starts.
        reserve: Room kept for the next output: what the agent may generate in one turn.
        overlap_turns: Most turns carried over instead, as far as they fit; None bounds tokens.
        fade: Most environment tokens that a turn carried over still shows, by age: the newest
            first, the last number for all older ones. What stands in the middle of the text is left
            out; what the assistant said never is. Empty shows turns whole.
        marker: Tokens that stand, and count, where text was left out.
    """

    limit: int
    overlap: int
    reserve: int
    overlap_turns: int | None = None
    fade: tuple[int, ...] = ()
    marker: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.overlap_turns is not None and self.overlap_turns < 0:
            raise UserError(
                f"splitting: overlap_turns must be at least 0, not {self.overlap_turns}; raise it, "
                "or give null to bound the overlap in tokens."
            )
        if (
            any(older > newer for newer, older in pairwise(self.fade))
            or min(self.fade, default=0) < 0
        ):
            raise UserError(
                f"splitting: fade must not grow with age nor be negative, unlike {self.fade}; give "
                "tokens in descending order, as in [1024,256,64]."
            )
        if self.fade and self.fade[-1] < len(self.marker):
            raise UserError(
                f"splitting: fade={list(self.fade)} has no room for the {len(self.marker)} tokens "
                "that say that text was left out; raise its last number."
            )
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

    def check_prefix(self, prefix_len: int, where: str, otherwise: str = "") -> None:
        """Refuses a pinned prefix that leaves no room for a turn.

        Args:
            prefix_len: Its tokens.
            where: Names the trajectory or task.
            otherwise: What else may be done than raising the limit.

        Raises:
            UserError: Names the trajectory or task and the limit that would do.
        """
        if prefix_len + self.reserve >= self.limit:
            raise UserError(
                f"{where}: the pinned prefix has {prefix_len} tokens, which with a reserve of "
                f"{self.reserve} does not fit into splitting.context_limit={self.limit}; "
                f"raise it above {prefix_len + self.reserve}{otherwise}."
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
    _left_out: tuple[_Stretch, ...] = ()
    _suffixes: list[_Stretch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._keep_from = self.prefix_len

    def fork(self) -> "WindowTracker":
        """A tracker that goes on from here by itself, for a turn that may not come about."""
        other = copy(self)
        other.closed, other._suffixes = list(self.closed), list(self._suffixes)
        return other

    @property
    def keep_from(self) -> int:
        """Where the current window's history begins."""
        return self._keep_from

    @property
    def left_out(self) -> tuple[tuple[int, int], ...]:
        """Stretches of the current window's history that are not shown."""
        return self._left_out

    def history(self, start: int) -> int:
        """Tokens of history that the current window shows before a turn at `start`."""
        return start - self._keep_from - self._spared(self._left_out)

    @property
    def uncut(self) -> bool:
        """Whether the first window still holds everything."""
        return not self.closed

    def open_turn(
        self, start: int, suffix_end: int, output_len: int = 0, *, restart: bool = False
    ) -> int:
        """Places the next turn.

        Args:
            start: Where the turn's suffix starts (or the prefix ends, if later).
            suffix_end: Where its suffix ends and its output begins.
            output_len: The output's length where it is known already.
            restart: Whether the turn's context does not extend what is there: nothing of it is
                kept beside the prefix.

        Returns:
            Where the history of the turn's window begins: the context is
            `stream[:prefix_len] + stream[that:suffix_end]` with the policy's marker in the place
            of what is `left_out`.

        Raises:
            ContextOverflow: The turn does not fit even without any history.
        """
        need = max(self.policy.reserve, output_len)
        if restart and self._suffixes:
            self._close()
            self._suffixes, self._left_out = [], ()
            self._keep_from = self._fresh_from = start
        room = self.policy.limit - need - self.prefix_len - (suffix_end - start)
        if self.history(start) > room:
            if room < 0:
                raise ContextOverflow(
                    f"a turn of {suffix_end - start + need} tokens does not fit beside a pinned "
                    f"prefix of {self.prefix_len} in a context of {self.policy.limit}; raise "
                    "splitting.context_limit or shorten the turn."
                )
            self._close()
            self._keep_from, self._left_out = self._carried_over(start, room)
            self._fresh_from = start
        self._suffixes.append((start, suffix_end))
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
        self._suffixes = [stretch for stretch in self._suffixes if stretch[0] >= prefix_len]

    def spans(self) -> tuple[WindowSpan, ...]:
        """All windows so far, the growing one last."""
        return (*self.closed, self._current())

    def _carried_over(self, start: int, room: int) -> tuple[int, tuple[_Stretch, ...]]:
        """Where the history of a window that opens at `start` begins, and what it leaves out."""
        turns, tokens = self.policy.overlap_turns, self.policy.overlap
        most = room if turns is not None else min(room, tokens)
        keep_from, left_out = start, tuple[_Stretch, ...]()
        for age, (begin, end) in enumerate(reversed(self._suffixes)):
            more = (*self._faded(age, begin, end), *left_out)
            if age == turns or start - begin - self._spared(more) > most:
                break
            keep_from, left_out = begin, more
        return keep_from, left_out

    def _faded(self, age: int, begin: int, end: int) -> tuple[_Stretch, ...]:
        """What is left out of the environment's tokens of a turn."""
        fade = self.policy.fade
        if not fade or end - begin <= (shown := fade[min(age, len(fade) - 1)]):
            return ()
        left, right = middle(end - begin, shown, len(self.policy.marker))
        return ((begin + left, begin + right),)

    def _spared(self, stretches: Iterable[_Stretch]) -> int:
        """By how many tokens a window is shorter without these stretches."""
        return sum(end - begin - len(self.policy.marker) for begin, end in stretches)

    def _current(self) -> WindowSpan:
        end = max(self._end, self._keep_from)
        marker = self.policy.marker if self._left_out else ()
        return WindowSpan(
            self.prefix_len, self._keep_from, self._fresh_from, end, self._left_out, marker
        )

    def _close(self) -> None:
        self.closed.append(self._current())


def middle(length: int, room: int, marker: int) -> tuple[int, int]:
    """Which stretch (begin, end) of a text a marker replaces, so that the rest fits.

    Args:
        length: Tokens of the text; more than the room.
        room: Tokens that may be shown, the marker included.
        marker: Tokens of the marker.
    """
    kept = room - marker
    return kept // 2, length - (kept - kept // 2)


def split(turns: Sequence[Turn], prefix_len: int, policy: ContextPolicy) -> tuple[WindowSpan, ...]:
    """Replays the policy over recorded turns.

    Args:
        turns: The recording; suffixes longer than `policy.longest_suffix` are refused.
        prefix_len: Pinned tokens at the front of the stream.
        policy: The numbers.

    Returns:
        The windows in order: every output token is trained in exactly one of them, but for those of
        turns that are not trained. Windows that would train nothing are left out.

    Raises:
        UserError: The prefix or a turn does not fit; the message names the turn.
    """
    lengths = ((len(turn.suffix_ids), len(turn.output_ids)) for turn in turns)
    restarts = {number for number, turn in enumerate(turns) if turn.restart}
    untrained = {number for number, turn in enumerate(turns) if not turn.trained}
    return split_lengths(lengths, prefix_len, policy, restarts, untrained)


def split_lengths(
    lengths: Iterable[tuple[int, int]],
    prefix_len: int,
    policy: ContextPolicy,
    restarts: Container[int] = (),
    untrained: Container[int] = (),
) -> tuple[WindowSpan, ...]:
    """`split` of turns of which only the lengths of suffix and output are known, and which restart.

    Args:
        lengths: Of each turn's suffix and output.
        prefix_len: Pinned tokens at the front of the stream.
        policy: The numbers.
        restarts: Turns that a window begins with whatever fits.
        untrained: Turns that are not trained.
    """
    tracker = WindowTracker(policy, prefix_len)
    position = 0
    trained: list[int] = []
    for number, (suffix_len, output_len) in enumerate(lengths):
        suffix_end = position + suffix_len
        end = suffix_end + output_len
        if end > prefix_len:
            try:
                start = max(position, prefix_len)
                tracker.open_turn(start, suffix_end, output_len, restart=number in restarts)
            except ContextOverflow as overflow:
                raise UserError(f"turn {number}: {overflow}") from None
        tracker.close_turn(end)
        position = end
        if number not in untrained:
            trained.append(end)
    return tuple(
        span
        for span in tracker.spans()
        if bisect_right(trained, span.fresh_from) < bisect_right(trained, span.end)
    )
