"""The stream of a trajectory and the windows cut out of it."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.message import Message, ToolCall
from klong_jax.core.trajectory import Status, Trajectory, Turn, Window, WindowSpan

IDS = st.lists(st.integers(0, 999), max_size=5).map(tuple)


@st.composite
def turns(draw: st.DrawFn) -> Turn:
    output = draw(st.lists(st.integers(0, 999), min_size=1, max_size=6).map(tuple))
    starts = sorted(draw(st.sets(st.integers(1, len(output)), max_size=2)) | {0})
    versions = draw(st.lists(st.integers(0, 9), min_size=3, max_size=3))
    return Turn(
        suffix_ids=draw(IDS),
        output_ids=output,
        logprobs=tuple(-float(token) for token in output),
        spans=tuple(zip((s for s in starts if s < len(output)), versions, strict=False)),
        tool_calls=(ToolCall("bash", {"command": "ls"}, "id"),),
        gen_s=1.5,
    )


def trajectory_of(turns: list[Turn], spans: list[WindowSpan]) -> Trajectory:
    return Trajectory(
        trajectory_id="r.0",
        task_id="t",
        messages=(Message("user", "do"), Message("assistant", "did"), Message("assistant", "end")),
        turns=tuple(turns),
        spans=tuple(spans),
        status=Status.DONE,
        active_s=2.0,
        failures={"malformed": 1},
        artifact_hash="a",
        pinned_messages=1,
    )


@given(st.lists(turns(), min_size=1, max_size=6), st.data())
def test_windows_that_tile_the_stream_train_every_sampled_token_once(
    recorded: list[Turn], data: st.DataObject
) -> None:
    length = sum(len(turn.suffix_ids) + len(turn.output_ids) for turn in recorded)
    prefix = data.draw(st.integers(0, length))
    cuts = sorted(data.draw(st.sets(st.integers(prefix, length), max_size=3)) | {length})
    spans, fresh = [], 0
    for end in cuts:
        keep = data.draw(st.integers(prefix, max(prefix, min(fresh, end))))
        spans.append(WindowSpan(prefix, keep, fresh, end))
        fresh = end
    trajectory = trajectory_of(recorded, spans)
    assert trajectory.stream_len == length

    spoken = [token for turn in recorded for token in turn.output_ids]
    trained = [window.tokens[window.trained_mask] for window in trajectory.windows()]
    assert np.concatenate(trained).tolist() == spoken
    for window, span in zip(trajectory.windows(), spans, strict=True):
        assert len(window.tokens) == span.length
        own = window.trained_mask
        # The test's log-probabilities are the negated tokens.
        assert np.array_equal(window.behaviour_logprobs[own], -window.tokens[own])
        assert (window.policy_version[own] >= 0).all()


def test_what_a_window_carries() -> None:
    first = Turn((1, 2), (3, 4, 5), (-3.0, -4.0, -5.0), ((0, 7), (2, 8)))
    second = Turn((6,), (9,), (-9.0,), ((0, 8),))
    window = trajectory_of([first, second], [WindowSpan(2, 4, 5, 7)]).windows()[0]
    assert window.tokens.tolist() == [1, 2, 5, 6, 9]
    assert window.trained_mask.tolist() == [False, False, False, False, True]
    assert window.policy_version.tolist() == [-1, -1, 8, -1, 8]
    assert window.behaviour_logprobs.tolist() == [0, 0, -5, 0, -9]
    assert window.tokens.dtype == np.int32


def test_what_is_left_out_of_a_window_is_not_shown() -> None:
    turns = [Turn((1, 2), (3,)), Turn((4, 5, 6, 7), (8,)), Turn((9,), (10,))]
    span = WindowSpan(1, 3, 8, 10, ((4, 6), (7, 7)), (20, 21))
    window = trajectory_of(turns, [span]).windows()[0]
    assert window.tokens.tolist() == [1, 4, 20, 21, 7, 20, 21, 8, 9, 10]
    assert window.trained_mask.tolist() == [False] * 9 + [True]
    assert window.policy_version.tolist() == [-1] * 7 + [0, -1, 0]
    assert span.length == len(window.tokens)
    trajectory = trajectory_of(turns, [span])
    assert Trajectory.from_json(json.loads(json.dumps(trajectory.to_json()))) == trajectory


def test_a_demonstration_has_no_logprobs() -> None:
    window = trajectory_of([Turn((1,), (2, 3))], [WindowSpan(0, 0, 0, 3)]).windows()[0]
    assert window.behaviour_logprobs.tolist() == [0, 0, 0]
    assert window.trained_mask.tolist() == [False, True, True]


@given(st.lists(turns(), max_size=4))
def test_a_trajectory_survives_json(recorded: list[Turn]) -> None:
    trajectory = trajectory_of(recorded, [WindowSpan(0, 0, 0, 0)])
    again = Trajectory.from_json(json.loads(json.dumps(trajectory.to_json())))
    assert again == trajectory
    assert again.assistant_turns == 2


@pytest.mark.parametrize("positions", [(3, 2, 0, 4), (0, 5, 0, 4), (0, 0, 5, 4)])
def test_positions_out_of_order_are_refused(positions: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="out of order"):
        WindowSpan(*positions)


@pytest.mark.parametrize("left_out", [((1, 3),), ((3, 2),), ((2, 4), (3, 5)), ((5, 7),)])
def test_what_is_left_out_lies_in_order_within_the_window(
    left_out: tuple[tuple[int, int], ...],
) -> None:
    with pytest.raises(ValueError, match="out of order"):
        WindowSpan(0, 2, 4, 6, left_out)


def test_fields_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 output tokens but 1 logprobs"):
        Turn((), (1, 2), (0.0,))
    arrays: list[Any] = [np.zeros(2), np.zeros(2, bool), np.zeros(3), np.zeros(2)]
    with pytest.raises(ValueError, match=r"window 4 has token fields of lengths \[2, 3\]"):
        Window(4, 0, *arrays, end=2)
