"""The readers on files that real agents wrote."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from klong_jax.text.formats import (
    Recording,
    detect,
    read_recordings,
    write_atif,
    write_openai_jsonl,
)

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("KLONG_SHARED", ROOT.parent / "shared"))


def real(name: str) -> Path:
    path = SHARED / "data" / "trajectories" / name
    if not path.exists():
        refuse = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        refuse(f"{path} is not here; set KLONG_SHARED")
    return path


def strict(path: Path) -> list[Recording]:
    return list(read_recordings(path))


def roles(recording: Recording) -> dict[str, int]:
    return dict(Counter(message.role for message in recording.messages))


def first_call(recording: Recording) -> tuple[str, dict[str, Any], str]:
    call = next(call for message in recording.messages for call in message.tool_calls)
    return call.name, call.arguments, call.call_id


def contents(recording: Recording, *wanted: str) -> list[str]:
    return [message.content for message in recording.messages if message.role in wanted]


def test_atif_gives_each_step_and_pairs_calls_with_results() -> None:
    path = real("atif/openhands_ponylang__ponyc-4588.atif.json")
    assert detect(path) == "atif"
    (recording,) = strict(path)
    steps = json.loads(path.read_text())["steps"]
    assert recording.recording_id == "ponylang__ponyc-4588"
    assert roles(recording) == {"system": 1, "user": 1, "assistant": 49, "tool": 49}
    command = {"command": "cd /workspace/ponylang__ponyc__0.1 && ls -l"}
    assert first_call(recording) == ("execute_bash", command, "toolu_01")
    assert contents(recording, "system", "user", "assistant") == [s["message"] for s in steps]
    results = [s["observation"]["results"][0] for s in steps if "observation" in s]
    assert contents(recording, "tool") == [result["content"] for result in results]
    answered = [m.tool_call_id for m in recording.messages if m.role == "tool"]
    assert answered == [c.call_id for m in recording.messages for c in m.tool_calls]


def test_mini_swe_agent_is_read_word_for_word() -> None:
    path = real("mini-swe-agent/github_issue.traj.json")
    assert detect(path) == "mini-swe-agent"
    (recording,) = strict(path)
    source = json.loads(path.read_text())
    assert [(m.role, m.content) for m in recording.messages] == [
        (m["role"], m["content"]) for m in source
    ]
    assert roles(recording) == {"system": 1, "user": 11, "assistant": 10}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("i_got_id_demo.traj", {"system": 1, "user": 22, "assistant": 21}),
        ("katy.traj", {"system": 1, "user": 18, "assistant": 18}),
        (
            "marshmallow-1867.default_install_from_source.traj",
            {"system": 1, "user": 15, "assistant": 14},
        ),
    ],
)
def test_swe_agent_history_is_whole_and_ends_with_the_last_observation(
    name: str, expected: dict[str, int]
) -> None:
    path = real(f"swe-agent/{name}")
    assert detect(path) == "swe-agent"
    (recording,) = strict(path)
    source = json.loads(path.read_text())
    assert roles(recording) == expected
    told = [(m["role"], m["content"]) for m in source["history"]]
    assert [(m.role, m.content) for m in recording.messages][: len(told)] == told
    heard = contents(recording, "user")
    for step in source["trajectory"]:
        assert any(step["observation"].strip() in text for text in heard)
    assert recording.meta["info"]["exit_status"] == "submitted"


def test_swe_agent_function_calls_are_paired_with_their_answers() -> None:
    (recording,) = strict(real("swe-agent/function_calling_simple.traj"))
    assert roles(recording) == {"system": 1, "user": 1, "assistant": 5, "tool": 5}
    name, arguments, call_id = first_call(recording)
    assert (name, arguments) == ("find_file", {"file_name": "missing_colon.py"})
    assert recording.messages[3].tool_call_id == call_id == "call_PbWErNIge3YTrli3fiVvmIid"


def test_openhands_events_become_the_conversation_the_model_had() -> None:
    path = real("openhands/multi_swe_bench_examples_output.jsonl")
    assert detect(path) == "openhands"
    recordings = strict(path)
    assert [recording.recording_id for recording in recordings] == [
        "ponylang__ponyc-4595",
        "ponylang__ponyc-4593",
        "ponylang__ponyc-4588",
    ]
    assert [roles(recording) for recording in recordings] == [
        {"system": 1, "user": 2, "assistant": 23, "tool": 22},
        {"system": 1, "user": 3, "assistant": 33, "tool": 32},
        {"system": 1, "user": 3, "assistant": 49, "tool": 49},
    ]
    command = {"command": "ls -l /workspace/ponylang__ponyc__0.1"}
    assert first_call(recordings[0]) == ("execute_bash", command, "toolu_01")
    for recording, line in zip(recordings, path.read_text().splitlines(), strict=True):
        source = json.loads(line)
        heard = contents(recording, "tool", "user")
        seen = [event["content"] for event in source["history"] if "observation" in event]
        assert len(seen) == len(heard) - 1  # the task itself is no observation
        for text, message in zip(seen, heard[1:], strict=True):
            assert text in message
        # A think action's thought is its call's argument; any other's is what the model said.
        acts = [e for e in source["history"] if e.get("tool_call_metadata") and "action" in e]
        spoken = [message for message in recording.messages if message.role == "assistant"]
        for event, message in zip(acts, spoken, strict=True):
            said = message.content
            if event["action"] == "think":
                said += "\n" + message.tool_calls[0].arguments["thought"]
            assert "".join(event["args"]["thought"].split()) == "".join(said.split())
        assert recording.meta["internal_events"] == {"recall": 1}
    assert "[The command completed with exit code 0.]" in recordings[0].messages[4].content
    assert "GITHUB_TOKEN" in recordings[0].messages[2].content  # knowledge the recall showed
    assert "maximum iteration" in recordings[2].meta["error"]


def test_openhands_and_its_atif_export_say_the_same() -> None:
    events = strict(real("openhands/multi_swe_bench_examples_output.jsonl"))[2]
    (export,) = strict(real("atif/openhands_ponylang__ponyc-4588.atif.json"))
    spoken = [m for m in events.messages if m.role == "assistant"]
    exported = [m for m in export.messages if m.role == "assistant"]
    assert [m.tool_calls for m in spoken] == [m.tool_calls for m in exported]


def test_the_resolver_has_no_ids_and_its_actions_become_calls() -> None:
    path = real("openhands/resolver_mock_output.jsonl")
    assert detect(path) == "openhands"
    recordings = strict(path)
    assert [r.recording_id for r in recordings] == ["neubig/pr-viewer#5", "neubig/pr-viewer#1"]
    assert [roles(recording) for recording in recordings] == [
        {"user": 1, "assistant": 4, "tool": 3},
        {"user": 1, "assistant": 22, "tool": 21},
    ]
    assert first_call(recordings[0]) == ("run", {"command": "touch LICENSE"}, "")
    assert recordings[0].messages[1].content.startswith("Certainly! I'll add the MIT license")
    for recording, line in zip(recordings, path.read_text().splitlines(), strict=True):
        history = json.loads(line)["history"]
        assert contents(recording, "tool") == [e["content"] for e in history if "observation" in e]
        codes = [e["code"] for e in history if e.get("action") == "run_ipython"]
        calls = [c for m in recording.messages for c in m.tool_calls if c.name == "run_ipython"]
        assert [call.arguments for call in calls] == [{"code": code} for code in codes]


def test_tau_bench_keeps_every_message_call_and_reward() -> None:
    path = real("tau-bench/gpt-4o-airline.json")
    assert detect(path) == "tau-bench"
    recordings = strict(path)
    source = json.loads(path.read_text())
    assert len(recordings) == 200
    assert sum((Counter(roles(r)) for r in recordings), Counter()) == {
        "system": 200,
        "user": 1490,
        "assistant": 2454,
        "tool": 1164,
    }
    assert first_call(recordings[0]) == (
        "get_user_details",
        {"user_id": "mia_li_3668"},
        "call_oIHazX6yQrB8hUwl4cRilFKj",
    )
    assert len({recording.recording_id for recording in recordings}) == 200
    for recording, entry in zip(recordings, source, strict=True):
        assert recording.meta["score"] == entry["reward"]
        assert [m.content for m in recording.messages] == [
            m["content"] or "" for m in entry["traj"]
        ]


@pytest.mark.parametrize(
    "name",
    [
        "atif/openhands_ponylang__ponyc-4588.atif.json",
        "mini-swe-agent/github_issue.traj.json",
        "openhands/multi_swe_bench_examples_output.jsonl",
        "openhands/resolver_mock_output.jsonl",
        "swe-agent/function_calling_simple.traj",
        "swe-agent/i_got_id_demo.traj",
        "swe-agent/katy.traj",
        "swe-agent/marshmallow-1867.default_install_from_source.traj",
        "tau-bench/gpt-4o-airline.json",
    ],
)
def test_what_was_read_can_be_written_and_read_again(name: str, tmp_path: Path) -> None:
    recordings = [replace(one, source="") for one in strict(real(name))[:20]]
    write_openai_jsonl(tmp_path / "all.jsonl", recordings)
    again = [replace(one, source="") for one in strict(tmp_path / "all.jsonl")]
    assert again == recordings
    for before in recordings:
        write_atif(tmp_path / "one.json", before)
        assert [replace(after, source="") for after in strict(tmp_path / "one.json")] == [before]


def test_the_atif_export_is_written_as_it_was(tmp_path: Path) -> None:
    path = real("atif/openhands_ponylang__ponyc-4588.atif.json")
    write_atif(tmp_path / "again.json", strict(path)[0])
    source, again = json.loads(path.read_text()), json.loads((tmp_path / "again.json").read_text())
    kept = ("step_id", "source", "message", "tool_calls", "observation")
    steps = source.pop("steps")
    assert [{key: step[key] for key in kept if key in step} for step in steps] == again.pop("steps")
    assert again == source
