"""Small nouns: messages, requests, judgements, budgets, clocks."""

import json
from typing import Any

import pytest

from klong_jax.core.clock import VirtualClock, WallClock
from klong_jax.core.message import Message, ToolCall
from klong_jax.core.rollout import Judgement, RolloutRequest, Verdict
from klong_jax.core.task import Budget


@pytest.mark.parametrize(
    "message",
    [
        Message("user", "hi"),
        Message("assistant", "", "thought", (ToolCall("bash", {"command": "ls"}, "c1"),)),
        Message("tool", "out", tool_call_id="c1"),
    ],
)
def test_messages_survive_json(message: Message) -> None:
    assert Message.from_json(json.loads(json.dumps(message.to_json()))) == message


def test_a_plain_message_has_no_empty_fields() -> None:
    assert Message("user", "hi").to_json() == {"role": "user", "content": "hi"}


def test_impossible_messages_are_refused() -> None:
    stranger: Any = "developer"
    with pytest.raises(ValueError, match="role must be one of"):
        Message(stranger, "")
    with pytest.raises(ValueError, match="only an assistant"):
        Message("user", "", tool_calls=(ToolCall("bash", {}),))


def test_a_request_names_its_trajectory_by_attempt() -> None:
    first = RolloutRequest("r", "g", 0, "t", 60.0, seed=1)
    again = RolloutRequest("r", "g", 0, "t", 60.0, seed=1, attempt=1)
    assert (first.trajectory_id, again.trajectory_id) == ("r.0", "r.1")
    assert RolloutRequest(**first.to_json()) == first


def judgement_of(score: float | None, status: Verdict) -> Judgement:
    return Judgement("r.0", "a", "b", "judge/1", {"0": 1.0}, score, status)


def test_judgements_survive_json() -> None:
    for judgement in judgement_of(0.5, Verdict.VALID), judgement_of(None, Verdict.FAILED):
        assert Judgement.from_json(json.loads(json.dumps(judgement.to_json()))) == judgement


@pytest.mark.parametrize(("score", "status"), [(0.0, Verdict.FAILED), (None, Verdict.VALID)])
def test_only_a_valid_judgement_has_a_score(score: float | None, status: Verdict) -> None:
    with pytest.raises(ValueError, match="exactly a valid judgement has a score"):
        judgement_of(score, status)


@pytest.mark.parametrize("numbers", [(0.0, 1, 1.0), (1.0, 0, 1.0), (1.0, 1, -1.0)])
def test_budgets_are_positive(numbers: tuple[float, int, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Budget(*numbers)


def test_a_wall_clock_charges_what_was_measured() -> None:
    clock = WallClock()
    assert (clock.generated(10, 2.0), clock.tool(0.5)) == (2.0, 0.5)
    assert clock.active_s() == 2.5
    assert clock.affordable_tokens(1.0) is None


def test_a_virtual_clock_charges_prices() -> None:
    clock = VirtualClock(token_s=0.25, tool_s=2.0)
    assert (clock.generated(10, 99.0), clock.tool(99.0)) == (2.5, 2.0)
    assert clock.active_s() == 4.5
    assert clock.affordable_tokens(1.1) == 4
    assert clock.affordable_tokens(-1.0) == 0
    assert VirtualClock(0.0, 1.0).affordable_tokens(1.0) is None
