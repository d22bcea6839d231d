"""The chunking plan of a trajectory: what each window shows and trains."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from klong_jax.core.trajectory import Turn, WindowSpan


@dataclass(frozen=True)
class WindowPlan:
    """One window, in tokens and turns.

    Attributes:
        index: Position among the windows.
        length: Tokens in the window.
        prefix_tokens: Pinned tokens at its front.
        start: Stream position where its history begins.
        end: Stream position where it ends.
        overlap_tokens: Tokens of history it shares with the window before.
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
        output_tokens: Tokens the assistant said; every one is trained once.
        cut_turns: Turns whose environment text was shortened to fit.
        cut_tokens: Environment tokens left out by that.
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
    windows: tuple[WindowPlan, ...]
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return asdict(self)


def plan_windows(turns: Sequence[Turn], spans: Sequence[WindowSpan]) -> tuple[WindowPlan, ...]:
    """Describes windows that `split` made of turns."""
    ends = list(accumulate(len(turn.suffix_ids) + len(turn.output_ids) for turn in turns))
    plans = []
    for index, span in enumerate(spans):
        first = bisect_left(ends, span.fresh_from + 1)
        last = bisect_left(ends, span.end)
        shown = bisect_left(ends, span.keep_from + 1)
        plans.append(
            WindowPlan(
                index=index,
                length=span.length,
                prefix_tokens=span.prefix_len,
                start=span.keep_from,
                end=span.end,
                overlap_tokens=max(0, spans[index - 1].end - span.keep_from) if index else 0,
                context_turns=first - shown if index else 0,
                first_trained_turn=first,
                last_trained_turn=last,
                trained_tokens=sum(len(turn.output_ids) for turn in turns[first : last + 1]),
            )
        )
    return tuple(plans)
