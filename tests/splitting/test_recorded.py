"""Splitting recordings: the modes against each other, and what is too long for any window."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.core.trajectory import Turn
from klong_jax.splitting.plan import plan_recorded
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.splitting.recorded import (
    Mode,
    SplitOptions,
    SplitRecording,
    split_recorded,
    tokens_of,
)

MARK = (-1, -2)
POLICY = ContextPolicy(limit=64, overlap=16, reserve=10, marker=MARK)
PREFIX = 6
TURNS = st.lists(
    st.tuples(st.integers(PREFIX, 90), st.integers(1, 12)), min_size=1, max_size=14
)  # fmt: skip


def recording(lengths: list[tuple[int, int]]) -> tuple[Turn, ...]:
    """Turns whose tokens are all distinct."""
    turns, token = [], 0
    for suffix, output in lengths:
        middle = token + suffix
        turns.append(Turn(tuple(range(token, middle)), tuple(range(middle, middle + output))))
        token = middle + output
    return tuple(turns)


def made(
    turns: tuple[Turn, ...], options: SplitOptions, prefix_len: int = PREFIX
) -> SplitRecording:
    return split_recorded(turns, prefix_len, POLICY, options, "file:1")


def trained(split: SplitRecording) -> list[int]:
    return [t for window in split.windows() for t in window.tokens[window.trained_mask].tolist()]


def outputs(turns: tuple[Turn, ...]) -> list[int]:
    return [token for turn in turns for token in turn.output_ids]


@given(TURNS, st.sampled_from(["klong", "sliding_no_pin"]))
def test_windows_with_and_without_a_pin_train_everything_once(
    lengths: list[tuple[int, int]], mode: Mode
) -> None:
    turns = recording(lengths)
    split = made(turns, SplitOptions(mode=mode))
    assert trained(split) == outputs(turns)
    assert not split.dropped
    for window in split.windows():
        assert len(window.tokens) <= POLICY.limit
        assert window.prefix_len == (PREFIX if mode == "klong" else 0)
    later = [t for window in split.windows()[1:] for t in window.tokens.tolist()]
    if mode == "klong":
        assert later.count(0) == len(split.spans) - 1
    elif split.spans[-1].keep_from > 0:
        assert split.windows()[-1].tokens[0] != 0


@given(TURNS)
def test_a_truncated_recording_is_the_first_window_of_the_whole(
    lengths: list[tuple[int, int]],
) -> None:
    turns = recording(lengths)
    whole, cut = made(turns, SplitOptions()), made(turns, SplitOptions(mode="truncate_tail"))
    (window,) = cut.windows()
    assert window.tokens.tolist() == whole.windows()[0].tokens.tolist()
    assert cut.dropped == turns[len(cut.turns) :]
    plan = plan_recorded("a", "file:1", cut)
    assert plan.turns == len(turns)
    assert plan.dropped_tokens == tokens_of(cut.dropped)
    assert plan.output_tokens - plan.trained_tokens == len(outputs(cut.dropped))
    assert set(cut.cut_turns) <= set(range(len(cut.turns)))
    assert plan.stream_tokens + plan.cut_tokens >= tokens_of(turns)


def test_a_long_text_is_cut_or_refused_as_asked() -> None:
    turns = recording([(6, 3), (80, 3), (4, 3)])
    split = made(turns, SplitOptions())
    assert split.cut_turns == (1,)
    assert -1 in split.windows()[1].tokens
    with pytest.raises(UserError, match=r"^file:1: turn 1: .*does not fit"):
        made(turns, SplitOptions(oversize="refuse"))
    # What is dropped anyway is refused to nobody.
    assert len(made(turns, SplitOptions(oversize="refuse", mode="truncate_tail")).dropped) == 2


@pytest.mark.parametrize("options", [SplitOptions(), SplitOptions(oversize="refuse")])
def test_what_the_assistant_said_is_never_cut(options: SplitOptions) -> None:
    with pytest.raises(UserError, match="turn 1"):
        made(recording([(6, 3), (4, 70)]), options)
    with pytest.raises(UserError, match="turn 0"):
        made(recording([(6, 70)]), SplitOptions(mode="truncate_tail"))


def test_a_recording_without_answers_is_refused() -> None:
    with pytest.raises(UserError, match="file:1: has no assistant message"):
        made((), SplitOptions())


def test_everything_may_be_pinned_and_is_trained_in_the_one_window() -> None:
    turns = recording([(6, 3), (6, 3)])
    split = made(turns, SplitOptions(), prefix_len=30)
    assert split.prefix_len == 18
    assert trained(split) == outputs(turns)


def test_a_prefix_that_is_too_long_may_be_shortened_by_the_rule() -> None:
    with pytest.raises(UserError, match=r"file:1: the pinned prefix.* above 72, or pin less by"):
        made(recording([(80, 3)]), SplitOptions(), prefix_len=62)
