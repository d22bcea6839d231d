"""The chunking plan of a trajectory: what each window shows and trains."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from klong_jax.core.trajectory import Turn, WindowSpan
from klong_jax.splitting.recorded import SplitRecording, tokens_of


@dataclass(frozen=True)
class WindowPlan:
    """One window, in tokens and turns.

    Attributes:
        index: Position among the windows.
        length: Tokens in the window.
        prefix_tokens: Pinned tokens at its front.
        start: Stream position where its history begins.
        end: Stream position where it ends.
        overlap_tokens: Tokens of history it shares with the window before, those that say that
            text faded included.
        faded_tokens: Tokens that it leaves out of that history's environment texts.
        context_turns: Turns shown but trained elsewhere.
        first_trained_turn: First turn trained here.
        last_trained_turn: Last turn trained here.
        trained_tokens: Output tokens trained here.
    """

    index: int
    length: int
    prefix_tokens: int
    start: int
    end: int
    overlap_tokens: int
    faded_tokens: int
    context_turns: int
    first_trained_turn: int
    last_trained_turn: int
    trained_tokens: int


@dataclass(frozen=True)
class TrajectoryPlan:
    """How one trajectory is split.

    Attributes:
        trajectory_id: Its name.
        source: Where it was read from.
        turns: Assistant turns.
        stream_tokens: Tokens of the whole interaction, each counted once.
        output_tokens: Tokens the assistant said in turns that are to be trained; every one is
            trained once, but in dropped turns.
        cut_turns: Turns whose environment text was shortened to fit.
        cut_tokens: Environment tokens left out by that.
        dropped_turns: Turns at the end that no window shows.
        dropped_tokens: All their tokens.
        windows: The windows.
        remarks: Where the dialect does not show the recording as it is, and why.
    """

    trajectory_id: str
    source: str
    turns: int
    stream_tokens: int
    output_tokens: int
    cut_turns: tuple[int, ...]
    cut_tokens: int
    dropped_turns: int
    dropped_tokens: int
    windows: tuple[WindowPlan, ...]
    remarks: tuple[str, ...] = ()

    @property
    def trained_tokens(self) -> int:
        """Tokens that its windows train."""
        return sum(window.trained_tokens for window in self.windows)

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return asdict(self)


def plan_recorded(trajectory_id: str, source: str, made: SplitRecording) -> TrajectoryPlan:
    """Describes how a recording was split."""
    every = (*made.turns, *made.dropped)
    return TrajectoryPlan(
        trajectory_id=trajectory_id,
        source=source,
        turns=len(every),
        stream_tokens=tokens_of(every),
        output_tokens=_trained_tokens(every),
        cut_turns=made.cut_turns,
        cut_tokens=made.cut_tokens,
        dropped_turns=len(made.dropped),
        dropped_tokens=tokens_of(made.dropped),
        windows=plan_windows(made.turns, made.spans),
    )


def plan_windows(turns: Sequence[Turn], spans: Sequence[WindowSpan]) -> tuple[WindowPlan, ...]:
    """Describes windows that `split` made of turns."""
    ends = list(accumulate(len(turn.suffix_ids) + len(turn.output_ids) for turn in turns))
    plans = []
    for index, span in enumerate(spans):
        first = bisect_left(ends, span.fresh_from + 1)
        last = bisect_left(ends, span.end)
        shown = bisect_left(ends, span.keep_from + 1)
        faded = sum(end - begin for begin, end in span.left_out)
        marks = len(span.left_out) * len(span.marker)
        shared = max(0, span.fresh_from - span.keep_from) - faded + marks
        plans.append(
            WindowPlan(
                index=index,
                length=span.length,
                prefix_tokens=span.prefix_len,
                start=span.keep_from,
                end=span.end,
                overlap_tokens=shared,
                faded_tokens=faded,
                context_turns=max(0, first - shown),
                first_trained_turn=first,
                last_trained_turn=last,
                trained_tokens=_trained_tokens(turns[first : last + 1]),
            )
        )
    return tuple(plans)


def _trained_tokens(turns: Sequence[Turn]) -> int:
    return sum(len(turn.output_ids) for turn in turns if turn.trained)
