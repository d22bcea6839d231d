"""Making a recording's oversized environment messages fit: cut in the middle, and said so."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from klong_jax.core.trajectory import Turn
from klong_jax.splitting.policy import ContextPolicy, middle


@dataclass(frozen=True)
class Fitted:
    """Turns whose suffixes fit beside the pinned prefix.

    Attributes:
        turns: The turns, shortened where needed.
        cut_turns: Indices of the turns that were shortened.
        cut_tokens: Environment tokens left out.
    """

    turns: tuple[Turn, ...]
    cut_turns: tuple[int, ...]
    cut_tokens: int


def fit_turns(turns: Sequence[Turn], prefix_len: int, policy: ContextPolicy) -> Fitted:
    """Cuts the middle out of suffixes that no window could show, as the agent does online.

    What the assistant said is never cut: a turn whose output is too long is left for `split` to
    refuse.

    Args:
        turns: The recording.
        prefix_len: Pinned tokens; turns that lie within them are left alone.
        policy: The numbers, and the marker that stands where text was left out.
    """
    marker = policy.marker
    fitted: list[Turn] = []
    cut: list[int] = []
    lost = position = 0
    for number, turn in enumerate(turns):
        pinned = max(0, min(prefix_len - position, len(turn.suffix_ids)))
        suffix = turn.suffix_ids[pinned:]
        need = max(policy.reserve, len(turn.output_ids))
        room = max(len(marker) + 2, policy.limit - prefix_len - need)
        position += len(turn.suffix_ids) + len(turn.output_ids)
        if position <= prefix_len or len(suffix) <= room:
            fitted.append(turn)
            continue
        shorter = truncate_middle(suffix, room, marker)
        cut.append(number)
        lost += len(suffix) + len(marker) - len(shorter)
        fitted.append(replace(turn, suffix_ids=(*turn.suffix_ids[:pinned], *shorter)))
    return Fitted(tuple(fitted), tuple(cut), lost)


def truncate_middle(ids: Sequence[int], room: int, marker: Sequence[int]) -> tuple[int, ...]:
    """Head and tail of `ids` around a marker, `room` tokens in all."""
    if len(ids) <= room:
        return tuple(ids)
    begin, end = middle(len(ids), room, len(marker))
    return (*ids[:begin], *marker, *ids[end:])
