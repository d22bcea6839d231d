"""The rules of pinning: what each keeps in view, and what the data says wins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message, Role, ToolCall
from klong_jax.splitting.pinning import Pin, pinned_messages
from klong_jax.text.chat import Chat
from klong_jax.text.tokenizer import bundled_tokenizer

CHAT = Chat(bundled_tokenizer())


def call(name: str) -> Message:
    return Message("assistant", "", tool_calls=(ToolCall(name, {"path": "x"}),))


READS, WORKS = call("read_file"), call("write_file")
ANSWER = Message("tool", "contents")
RECORDING = (
    Message("system", "You are an agent."),
    Message("user", "Do the task."),
    READS, ANSWER, READS, ANSWER, WORKS, ANSWER, READS, ANSWER, WORKS,
)  # fmt: skip


def tokens(front: tuple[Message, ...]) -> int:
    return CHAT.turns(front, len(front))[1]


def pinned(rule: str, messages: tuple[Message, ...] = RECORDING, marked: int | None = None) -> int:
    return pinned_messages(messages, Pin.parse(rule), marked, tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        ("opening", 2),
        ("reading", 6),
        ("turns:0", 2),
        ("turns:1", 4),
        ("turns:3", 8),
        ("turns:99", 10),
        ("tokens:0", 0),
        ("tokens:999999", 10),
    ],
)
def test_each_rule_keeps_its_part(rule: str, count: int) -> None:
    assert pinned(rule) == count
    assert pinned(rule, marked=3) == 3
    assert pinned(rule, marked=0) == 0


def test_a_recording_that_only_reads_keeps_its_last_turn_free() -> None:
    assert pinned("reading", RECORDING[:6]) == 4


def test_without_an_answer_everything_is_pinned() -> None:
    for rule in ("opening", "reading", "turns:1", "tokens:1"):
        assert pinned(rule, RECORDING[:2]) == 2


def test_talk_is_no_reading() -> None:
    talk = Message("assistant", "What would you like?")
    assert pinned("reading", (*RECORDING[:2], talk, Message("user", "Work."), WORKS)) == 2


def test_an_opening_that_does_not_fit_is_pinned_message_by_message() -> None:
    system = tokens(RECORDING[:1])
    assert pinned(f"tokens:{system}") == 1
    assert pinned(f"tokens:{system - 1}") == 0


ROLES = st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), min_size=1, max_size=25)


@given(ROLES, st.integers(0, 200))
def test_a_budget_takes_as_many_messages_as_fit(roles: list[Role], budget: int) -> None:
    messages = tuple(Message(role, "word " * (n % 4)) for n, role in enumerate(roles))
    count = pinned(f"tokens:{budget}", messages)
    answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        return
    ends = sorted({*range(answers[0] + 1), *answers})
    assert count == max(end for end in ends if tokens(messages[:end]) <= budget)


@pytest.mark.parametrize(
    "text",
    ["", "all", "turns", "turns:", "turns:-1", "turns:x", "tokens:1.5", "opening:", "reading:3"],
)
def test_what_is_no_rule_is_refused_by_name(text: str) -> None:
    with pytest.raises(UserError, match=r"splitting\.pin=") as caught:
        Pin.parse(text)
    assert "turns:N" in str(caught.value)
