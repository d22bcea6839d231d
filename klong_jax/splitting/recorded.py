"""Splitting a recording: the agent's policy over it, and what only a recording leaves open.

The modes are what KLong's splitting is compared with (arXiv 2602.17547, section 3):

- `klong`: windows as the agent would see them, each with the pinned prefix in front.
- `sliding_no_pin`: the same windows without a pinned prefix; system prompt and task slide out of
  view like everything else.
- `truncate_tail`: the first window alone; the turns behind it are dropped and train nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from klong_jax.core.errors import UserError
from klong_jax.core.trajectory import Turn, Window, WindowSpan, cut_window, token_stream
from klong_jax.splitting.fit import Fitted, fit_turns
from klong_jax.splitting.pinning import OPENING, Pin
from klong_jax.splitting.policy import ContextPolicy, split

Mode = Literal["klong", "sliding_no_pin", "truncate_tail"]
Oversize = Literal["cut", "refuse"]


@dataclass(frozen=True)
class SplitOptions:
    """How recordings are split, beside the context policy.

    Attributes:
        pin: What every window keeps, where the data does not say.
        mode: What becomes of a recording that is longer than a window.
        oversize: Whether environment text that no window could show is cut in the middle, or its
            recording refused. What the assistant said is never cut.
    """

    pin: Pin = OPENING
    mode: Mode = "klong"
    oversize: Oversize = "cut"


DEFAULT_OPTIONS = SplitOptions()


@dataclass(frozen=True)
class SplitRecording:
    """A recording and its windows.

    Attributes:
        turns: The turns that windows show, shortened where needed.
        prefix_len: Pinned tokens at the front of every window.
        spans: The windows; every output token of `turns` that are trained is trained in exactly one
            of them.
        cut_turns: Indices of the turns that were shortened.
        cut_tokens: Environment tokens left out by that.
        dropped: The turns at the end that no window shows.
    """

    turns: tuple[Turn, ...]
    prefix_len: int
    spans: tuple[WindowSpan, ...]
    cut_turns: tuple[int, ...]
    cut_tokens: int
    dropped: tuple[Turn, ...]

    def windows(self) -> tuple[Window, ...]:
        """The windows, materialised."""
        stream = token_stream(self.turns)
        return tuple(cut_window(index, span, *stream) for index, span in enumerate(self.spans))


def split_recorded(
    turns: Sequence[Turn],
    prefix_len: int,
    policy: ContextPolicy,
    options: SplitOptions,
    where: str,
) -> SplitRecording:
    """Splits recorded turns into windows.

    Args:
        turns: The recording.
        prefix_len: Pinned tokens at the front of the stream.
        policy: The numbers.
        options: What the policy leaves open.
        where: Names the recording in errors.

    Raises:
        UserError: There is no turn to train, or the prefix or a turn does not fit; names `where`.
    """
    if not turns:
        raise UserError(f"{where}: has no assistant message; nothing can be trained.")
    if not any(turn.trained for turn in turns):
        raise UserError(f"{where}: nothing of the assistant is to be trained; remove the record.")
    # Messages behind the last answer may be marked as pinned, but are no part of the stream.
    prefix_len = min(prefix_len, tokens_of(turns)) if options.mode != "sliding_no_pin" else 0
    less = ", or pin less by splitting.pin or the data's pinned_messages"
    policy.check_prefix(prefix_len, where, less)

    def fitted(part: Sequence[Turn]) -> Fitted:
        if options.oversize == "refuse":
            return Fitted(tuple(part), (), 0)
        return fit_turns(part, prefix_len, policy)

    fit = fitted(turns)
    if options.mode == "truncate_tail":
        fit = fitted(turns[: _turns_of_first_window(fit.turns, policy)])
    try:
        spans = split(fit.turns, prefix_len, policy)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not spans:
        raise UserError(f"{where}: no window that is kept trains anything; remove the record.")
    return SplitRecording(
        turns=fit.turns,
        prefix_len=prefix_len,
        spans=spans,
        cut_turns=fit.cut_turns,
        cut_tokens=fit.cut_tokens,
        dropped=tuple(turns[len(fit.turns) :]),
    )


def tokens_of(turns: Sequence[Turn]) -> int:
    """Tokens that turns hold, environment and assistant together."""
    return sum(len(turn.suffix_ids) + len(turn.output_ids) for turn in turns)


def _turns_of_first_window(turns: Sequence[Turn], policy: ContextPolicy) -> int:
    """How many turns fit before the first cut; at least one, for `split` to refuse by name."""
    position = 0
    for number, turn in enumerate(turns):
        if turn.restart:
            return number
        position += len(turn.suffix_ids)
        if position + max(policy.reserve, len(turn.output_ids)) > policy.limit:
            return max(number, 1)
        position += len(turn.output_ids)
    return len(turns)
