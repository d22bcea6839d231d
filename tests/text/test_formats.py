"""Formats that no real file stands for, the errors, and the writer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message, ToolCall
from klong_jax.text.formats import (
    Recording,
    detect,
    read_recordings,
    write_atif,
    write_openai_jsonl,
)

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def save(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def one(path: Path) -> Recording:
    (recording,) = read_recordings(path)
    return recording


def test_openai_lines_keep_reasoning_parallel_calls_and_other_keys(tmp_path: Path) -> None:
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": f'{{"x": {i}}}'}}
        for i in range(2)
    ]
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}],
        },
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "0", "tool_call_id": "c0"},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]
    path = save(tmp_path / "x.bin", {"messages": messages, "score": 0.5}, {"messages": HELLO})
    assert detect(path) == "openai"
    recording, second = read_recordings(path)
    assert second.source == f"{path}:2"
    assert recording.meta == {"score": 0.5}
    system, user, assistant, *answers = recording.messages
    assert (system.role, system.content) == ("system", "a\nb")
    assert "http://x/y.png" in user.content
    assert assistant.reasoning == "hm"
    assert assistant.tool_calls == (ToolCall("f", {"x": 0}, "c0"), ToolCall("f", {"x": 1}, "c1"))
    assert [answer.tool_call_id for answer in answers] == ["c0", "c1"]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_bare_list_of_messages_is_one_recording(tmp_path: Path, indent: int | None) -> None:
    path = save(tmp_path / "talk.jsonl", json.dumps(HELLO, indent=indent))
    assert detect(path) == "openai"
    assert [m.content for m in one(path).messages] == ["hi", "hello"]


def test_sharegpt_speakers_and_function_calls(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "add"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "done"},
    ]
    path = save(tmp_path / "s.json", [{"conversations": turns, "system": "be brief", "id": "q"}])
    assert detect(path) == "sharegpt"
    recording = one(path)
    assert recording.recording_id == "q"
    assert recording.messages == (
        Message("system", "be brief"),
        Message("user", "add"),
        Message("assistant", "", tool_calls=(ToolCall("add", {"a": 1}),)),
        Message("tool", "1"),
        Message("assistant", "done"),
    )


def test_swe_agent_without_history_is_rebuilt_from_its_steps(tmp_path: Path) -> None:
    steps = [
        {"query": HELLO[:1], "response": "look", "observation": "nothing", "action": "ls"},
        {"query": [], "response": "stop", "observation": "", "action": "exit"},
    ]
    path = save(tmp_path / "a.traj", {"trajectory": steps, "info": {}})
    assert detect(path) == "swe-agent"
    spoken = [(message.role, message.content) for message in one(path).messages]
    assert spoken == [
        ("user", "hi"),
        ("assistant", "look"),
        ("user", "nothing"),
        ("assistant", "stop"),
        ("user", ""),
    ]


def test_mini_swe_agent_with_info_keeps_the_submission_apart(tmp_path: Path) -> None:
    document = {
        "trajectory_format": "mini-swe-agent-1.1",
        "info": {"exit_status": "Submitted"},
        "messages": [*HELLO, {"role": "exit", "content": "diff", "extra": {}}],
    }
    recording = one(save(tmp_path / "m", json.dumps(document, indent=1)))
    assert [message.role for message in recording.messages] == ["user", "assistant"]
    assert recording.meta["submission"] == "diff"
    assert recording.meta["info"] == {"exit_status": "Submitted"}


def test_atif_says_which_messages_are_copied_context(tmp_path: Path) -> None:
    call = {"tool_call_id": "c", "function_name": "f", "arguments": {}}
    steps = [
        {"step_id": 1, "source": "user", "message": "go"},
        {
            "step_id": 2,
            "source": "agent",
            "message": [{"type": "text", "text": "ok"}],
            "reasoning_content": "why not",
            "tool_calls": [call],
            "observation": {"results": [{"source_call_id": "c", "content": None}]},
            "is_copied_context": True,
        },
    ]
    path = save(tmp_path / "t", {"schema_version": "ATIF-v1.6", "agent": {}, "steps": steps})
    recording = one(path)
    assert recording.messages[1] == Message("assistant", "ok", "why not", (ToolCall("f", {}, "c"),))
    assert recording.messages[2] == Message("tool", "", tool_call_id="c")
    assert recording.untrained == (1, 2)
    assert "copied_context" not in recording.meta


def test_two_openhands_actions_of_one_response_are_one_message(tmp_path: Path) -> None:
    calls = [{"id": i, "function": {"name": "run", "arguments": "{}"}} for i in "ab"]
    response = {
        "id": "r",
        "choices": [{"message": {"role": "assistant", "content": "both", "tool_calls": calls}}],
    }
    history = [
        event
        for call in "ab"
        for event in (
            {"action": "run", "source": "agent", "args": {}, "tool_call_metadata": {
                "tool_call_id": call, "model_response": response}},
            {"observation": "run", "source": "agent", "content": call, "tool_call_metadata": {
                "tool_call_id": call}},
        )
    ]  # fmt: skip
    messages = one(save(tmp_path / "o", {"history": history})).messages
    assert [m.role for m in messages] == ["assistant", "tool", "tool"]
    assert [m.tool_call_id for m in messages[1:]] == ["a", "b"]


BAD_MESSAGES = [
    ([], "no messages"),
    ([{"role": "robot", "content": "x"}], "'role' must be one of"),
    ([{"role": "user"}], "messages[0]: has no field 'content'"),
    ([{"role": "user", "content": 3}], "'content' must be text or a list of parts"),
    (["hi"], "messages[0]: must be an object, not text"),
    ([{"role": "user", "content": "x", "tool_calls": [{}]}], "has no field 'function'"),
    (
        [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
            }
        ],
        "messages[0]: tool_calls[0]: field 'arguments' is not valid JSON",
    ),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": "data:" + "A" * 9_999}]}],
        "field content[0] holds",
    ),
]


@pytest.mark.parametrize(("messages", "problem"), BAD_MESSAGES)
def test_a_bad_record_is_named_by_file_line_and_field(
    tmp_path: Path, messages: list[Any], problem: str
) -> None:
    path = save(tmp_path / "x.jsonl", {"messages": HELLO}, {"messages": messages})
    with pytest.raises(UserError) as caught:
        list(read_recordings(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert problem in str(caught.value)


def test_bad_records_are_reported_and_the_rest_is_used(tmp_path: Path) -> None:
    rows = [
        "{broken",
        {"messages": HELLO},
        {"nothing": 1},
        {"messages": HELLO, "pinned_messages": 9},
    ]
    path = save(tmp_path / "x.jsonl", *rows, {"messages": HELLO, "id": "last"})
    reports: list[str] = []
    kept = list(read_recordings(path, skip_bad=True, on_skip=reports.append))
    assert [recording.recording_id for recording in kept] == ["x-2", "last"]
    assert [report.split(": ")[0] for report in reports] == [f"{path}:{n}" for n in (1, 3, 4)]
    with pytest.raises(UserError, match=r"x\.jsonl:1: not valid JSON"):
        list(read_recordings(path))


def test_a_bad_item_of_a_json_list_is_named_by_its_index(tmp_path: Path) -> None:
    path = save(tmp_path / "x.json", json.dumps([{"traj": HELLO}, {"traj": [{}]}], indent=1))
    with pytest.raises(UserError, match=r"x\.json\[1\]: traj\[0\]: has no field 'role'"):
        list(read_recordings(path))
    assert len(list(read_recordings(path, skip_bad=True, on_skip=lambda text: None))) == 1


@pytest.mark.parametrize("content", ["", "hello\n", '{"a": 1}', "[]", "17", '[{"a"\n:'])
def test_what_is_no_recording_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x"
    path.write_text(content)
    for attempt in (detect, lambda path: list(read_recordings(path))):
        with pytest.raises(UserError, match=str(path)):
            attempt(path)


def test_a_missing_file_a_folder_and_binary_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    for name in ("none", ".", "b"):
        with pytest.raises(UserError):
            detect(tmp_path / name)
    with pytest.raises(UserError, match=r"holds no file that ends in \.json, \.jsonl, \.traj"):
        list(read_recordings(tmp_path))


def test_a_folder_is_all_of_its_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("sub/b.json", "a.jsonl", ".hidden.json", "notes.txt"):
        (tmp_path / name).write_text(json.dumps({"messages": HELLO, "id": name}))
    assert [one.recording_id for one in read_recordings(tmp_path)] == ["a.jsonl", "sub/b.json"]
    (tmp_path / "broken.json").write_text("{\n")
    skipped: list[str] = []
    assert len(list(read_recordings(tmp_path, skip_bad=True, on_skip=skipped.append))) == 2
    assert len(skipped) == 1 and "broken.json:2:1: not valid JSON" in skipped[0]
    with pytest.raises(UserError, match=r"broken\.json"):
        list(read_recordings(tmp_path))


texts = st.text(max_size=20) | st.sampled_from(["\u2028", "\x85\n", "\ud800", "<|im_end|>"])
scalars = st.none() | st.booleans() | st.integers() | texts
calls = st.builds(
    ToolCall,
    name=st.text(min_size=1, max_size=8),
    arguments=st.dictionaries(texts, scalars | st.lists(scalars, max_size=3), max_size=3),
    call_id=texts,
)
messages = st.one_of(
    st.builds(Message, role=st.sampled_from(["system", "user"]), content=texts),
    st.builds(Message, role=st.just("tool"), content=texts, tool_call_id=texts),
    st.builds(
        Message,
        role=st.just("assistant"),
        content=texts,
        reasoning=texts,
        tool_calls=st.lists(calls, max_size=3).map(tuple),
    ),
)


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    talk = draw(st.lists(messages, min_size=1, max_size=5).map(tuple))
    return Recording(
        source="",
        recording_id=draw(st.text(min_size=1, max_size=8)),
        messages=talk,
        pinned_messages=draw(st.none() | st.integers(0, len(talk))),
        meta=draw(st.dictionaries(texts, scalars, max_size=3)),
    )


@given(st.lists(recordings(), min_size=1, max_size=4))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, written: list[Recording]
) -> None:
    path = tmp_path_factory.mktemp("round") / "trip.jsonl"
    write_openai_jsonl(path, written)
    for before, after in zip(written, read_recordings(path), strict=True):
        assert after.recording_id == before.recording_id
        assert after.messages == before.messages
        assert after.pinned_messages == before.pinned_messages
        assert after.meta == before.meta


@given(recordings())
def test_an_atif_document_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, before: Recording
) -> None:
    path = tmp_path_factory.mktemp("round") / "trip.json"
    write_atif(path, before)
    assert detect(path) == "atif"
    (after,) = read_recordings(path)
    assert replace(after, source="") == before
    write_atif(path, after)
    assert [replace(again, source="") for again in read_recordings(path)] == [before]


def test_atif_steps_hold_the_answers_to_their_calls(tmp_path: Path) -> None:
    spoken = Message("assistant", "both", "hm", (ToolCall("f", {"x": 1}, "a"), ToolCall("g", {})))
    talk = (
        Message("system", "be"),
        Message("user", "do"),
        spoken,
        Message("tool", "one", tool_call_id="a"),
        Message("tool", "two"),
        Message("user", "and?"),
        Message("tool", "late", tool_call_id="a"),
    )
    path = tmp_path / "t.json"
    write_atif(path, Recording("", "r", talk, 2, untrained=(0, 2)), continued_in="next.json")
    document = json.loads(path.read_text())
    assert document["schema_version"] == "ATIF-v1.6"
    assert document["agent"].keys() == {"name", "version"}
    assert document["continued_trajectory_ref"] == "next.json"
    steps = document["steps"]
    assert [step["step_id"] for step in steps] == [1, 2, 3, 4, 5]
    assert [step["source"] for step in steps] == ["system", "user", "agent", "user", "user"]
    assert [n for n, step in enumerate(steps) if step.get("is_copied_context")] == [0, 2]
    assert steps[2]["observation"]["results"] == [
        {"content": "one", "source_call_id": "a"},
        {"content": "two"},
    ]
    recording = one(path)
    assert recording.messages == talk
    assert recording.pinned_messages == 2
    assert recording.untrained == (0, 2, 3, 4)
    assert recording.meta == {}
    write_openai_jsonl(path, [recording])
    assert one(path).untrained == (0, 2, 3, 4)


@pytest.mark.parametrize("weight", [2, "0", None, -1])
def test_a_weight_of_openai_is_0_or_1(tmp_path: Path, weight: object) -> None:
    said = [{"role": "assistant", "content": "a", "weight": w} for w in (0, 1, 0.0)]
    assert one(save(tmp_path / "a", {"messages": said})).untrained == (0, 2)
    said[1]["weight"] = weight
    with pytest.raises(UserError, match=r"messages\[1\]: field 'weight' must be 0 or 1"):
        one(save(tmp_path / "b", {"messages": said}))


@pytest.mark.parametrize("own", [3, {"meta": 3}, {"pinned_messages": "two"}])
def test_our_own_fields_in_atif_are_checked(tmp_path: Path, own: object) -> None:
    steps = [{"source": "user", "message": "hi"}]
    document = {"schema_version": "ATIF-v1.6", "steps": steps, "extra": {"klong": own}}
    with pytest.raises(UserError, match=r"extra.*must be"):
        one(save(tmp_path / "t", document))


def test_tool_calls_are_written_in_the_wire_form(tmp_path: Path) -> None:
    spoken = Message("assistant", "", tool_calls=(ToolCall("f", {"x": 1}, "c"),))
    path = tmp_path / "w.jsonl"
    write_openai_jsonl(path, [Recording("", "r", (spoken,))])
    (call,) = json.loads(path.read_text())["messages"][0]["tool_calls"]
    assert call == {
        "id": "c",
        "type": "function",
        "function": {"name": "f", "arguments": '{"x": 1}'},
    }
