"""Windows as documents: together they say what the recording said, each what its window shows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message, ToolCall
from klong_jax.core.trajectory import token_stream
from klong_jax.pipelines.config.training import TokenisedDataSection
from klong_jax.pipelines.split import split_recording
from klong_jax.pipelines.tokenised import Tokeniser, tokenised_windows
from klong_jax.pipelines.windows import check_windows_folder, write_windows
from klong_jax.splitting.pinning import Pin
from klong_jax.splitting.plan import plan_recorded
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.splitting.recorded import Mode, SplitOptions
from klong_jax.text.chat import Chat
from klong_jax.text.formats import Recording, read_recordings
from klong_jax.text.tokenizer import bundled_tokenizer

CHAT = Chat(bundled_tokenizer())
POLICY = ContextPolicy(200, 60, 20)


def call(number: int, name: str = "bash") -> tuple[Message, Message]:
    calls = (ToolCall(name, {"command": f"step {number}"}, f"c{number}"),)
    answer = Message("tool", f"result {number} of many", tool_call_id=f"c{number}")
    return Message("assistant", f"now {number}", tool_calls=calls), answer


RECORDING = Recording(
    "f:1",
    "a/b",
    (
        Message("system", "Be good."),
        Message("user", "Do it."),
        *call(0, "read_file"),
        *(message for number in range(1, 12) for message in call(number)),
        Message("assistant", "done"),
        Message("user", "thanks"),
    ),
    meta={"score": 1.0},
)


def written(folder: Path, pin: str, mode: Mode, pinned: int) -> list[Recording]:
    made = split_recording(CHAT, RECORDING, POLICY, SplitOptions(Pin.parse(pin), mode))
    plan = plan_recorded("a/b", "f:1", made)
    write_windows(folder, 7, RECORDING, pinned, plan)
    documents = [one for path in sorted(folder.iterdir()) for one in read_recordings(path)]
    assert len(documents) == len(plan.windows)
    return documents


@pytest.mark.parametrize(
    ("pin", "mode", "pinned"),
    [
        ("opening", "klong", 2),
        ("reading", "klong", 4),
        ("turns:2", "klong", 6),
        ("opening", "sliding_no_pin", 0),
    ],
)
def test_every_answer_is_fresh_in_exactly_one_document(
    tmp_path: Path, pin: str, mode: Mode, pinned: int
) -> None:
    documents = written(tmp_path, pin, mode, pinned)
    assert len(documents) > 2
    fresh = [
        message
        for document in documents
        for number, message in enumerate(document.messages)
        if message.role == "assistant" and number not in document.untrained
    ]
    assert fresh == [message for message in RECORDING.messages if message.role == "assistant"]
    for document in documents:
        assert document.messages[:pinned] == RECORDING.messages[:pinned]
        assert document.pinned_messages == pinned
        assert (document.recording_id, document.meta["score"]) == ("a/b", 1.0)
    assert documents[0].untrained == ()
    for document in documents[1:]:
        assert set(range(pinned)) <= set(document.untrained)


def test_a_document_shows_what_its_window_shows(tmp_path: Path) -> None:
    documents = written(tmp_path, "opening", "klong", 2)
    windows = split_recording(CHAT, RECORDING, POLICY).windows()
    for document, window in zip(documents, windows, strict=True):
        turns, _ = CHAT.turns(document.messages, 2)
        shown, seen = (
            CHAT.tokenizer.decode(t.tolist()) for t in (token_stream(turns)[0], window.tokens)
        )
        # Behind the pinned prefix, a window goes on with the line break of a turn it leaves out.
        assert shown.replace("\n", "") == seen.replace("\n", "")


@pytest.mark.parametrize("limit", [200, 150])
def test_what_documents_repeat_is_not_trained_again(tmp_path: Path, limit: int) -> None:
    documents = written(tmp_path / "windows", "opening", "klong", 2)
    path = tmp_path / "windows"
    data = TokenisedDataSection(
        path=path, skip_bad=False, mix=(), heldout=None, cache=None, workers=1
    )
    context = ContextPolicy(limit, 60, 20)
    tokeniser = Tokeniser(CHAT, context, SplitOptions())
    groups = tokenised_windows(
        data, tokeniser, tmp_path / "cache", Console(quiet=True), draws=1, seed=0
    ).groups
    assert (len(groups) == len(documents)) == (limit == POLICY.limit)
    again = [window for group in groups for window in group]
    once = split_recording(CHAT, RECORDING, POLICY).windows()
    assert all(window.trained_mask.any() for window in again)
    trained, expected = (
        np.concatenate([w.tokens[w.trained_mask] for w in windows]).tolist()
        for windows in (again, once)
    )
    assert trained == expected
    # The assistant's turns stay the assistant's: what is shown reads as it did.
    for document, window in zip(documents, again, strict=False):
        if limit == POLICY.limit:
            turns, _ = CHAT.turns(document.messages, 2)
            assert window.tokens.tolist() == token_stream(turns)[0].tolist()
            assert (window.policy_version[~window.trained_mask] == -1).all()
    first = split_recording(CHAT, documents[0], context)
    assert [turn.trained for turn in first.turns] == [True] * len(first.turns)
    nothing = replace(documents[1], untrained=tuple(range(len(documents[1].messages))))
    with pytest.raises(UserError, match="nothing of the assistant is to be trained"):
        split_recording(CHAT, nothing, context)


def test_documents_name_each_other_and_what_was_cut(tmp_path: Path) -> None:
    long = Message("tool", "word " * 400, tool_call_id="c")
    recording = Recording("f:1", "r", (*RECORDING.messages[:3], long, Message("assistant", "ok")))
    plan = plan_recorded("r", "f:1", split_recording(CHAT, recording, POLICY))
    write_windows(tmp_path / "new", 0, recording, 2, plan)
    first, second = (json.loads(p.read_text()) for p in sorted((tmp_path / "new").iterdir()))
    assert first["continued_trajectory_ref"] == "00000-001.json"
    assert "continued_trajectory_ref" not in second
    about = [document["extra"]["klong"]["meta"]["window"] for document in (first, second)]
    assert about == [
        {"index": 0, "count": 2, "faded_tokens": 0, "cut_turns": []},
        {"index": 1, "count": 2, "faded_tokens": 0, "cut_turns": [1]},
    ]


def test_windows_do_not_mix_with_what_is_there(tmp_path: Path) -> None:
    check_windows_folder(tmp_path)
    check_windows_folder(tmp_path / "new")
    (tmp_path / "old.json").write_text("{}")
    for path in (tmp_path, tmp_path / "old.json"):
        with pytest.raises(UserError, match="name a new or an empty folder"):
            check_windows_folder(path)
