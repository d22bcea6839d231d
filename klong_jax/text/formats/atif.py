"""ATIF, the agent trajectory interchange format, up to version 1.6; read and written.

A step of source system or user is one message. A step of source agent is an assistant message
followed by the results of its calls. Steps marked `is_copied_context` repeat what an earlier
trajectory already said; they are read like any other, as messages that are not trained.

What we write and ATIF has no field for stands in its free fields: `extra.klong` of a document holds
`pinned_messages` and `meta`, and `extra.klong` of a step the call that a tool's answer far from its
call names.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from klong_jax.core.jsonio import write_json
from klong_jax.core.message import Message, ToolCall
from klong_jax.text.formats.base import Format, Record, Recording, need, objects
from klong_jax.text.formats.openai import read_arguments, read_content, read_role

_VERSION = "ATIF-v1.6"
_SOURCES = {"system": "system", "user": "user", "agent": "assistant"}
_SPEAKERS = {role: source for source, role in _SOURCES.items()} | {"tool": "user"}
_ROOT_FIELDS = (
    "schema_version", "agent", "notes", "final_metrics", "continued_trajectory_ref", "extra"
)  # fmt: skip
_OWN = "klong"


def write_atif(path: Path, recording: Recording, *, continued_in: str = "") -> None:
    """Writes a recording as an ATIF document; `read_recordings` gives it back.

    Args:
        path: The file.
        recording: The recording; a step that begins with an untrained message is marked as copied.
        continued_in: Name of the document that goes on from here, if any.
    """
    document = _root(recording)
    if continued_in:
        document["continued_trajectory_ref"] = continued_in
    document["session_id"] = recording.recording_id
    document["steps"] = _steps(recording.messages, frozenset(recording.untrained))
    write_json(path, document)


def _is_atif(value: dict[str, Any]) -> bool:
    return str(value.get("schema_version", "")).startswith("ATIF")


def _root(recording: Recording) -> dict[str, Any]:
    """The document's fields but its name and steps: what was read, or what we must say."""
    meta = dict(recording.meta)
    if not _is_atif(meta):
        root: dict[str, Any] = {
            "schema_version": _VERSION,
            "agent": {"name": "unknown", "version": "unknown"},
        }
    elif recording.pinned_messages is None and all(key in _ROOT_FIELDS for key in meta):
        return meta
    else:
        root = {key: meta[key] for key in _ROOT_FIELDS if key in meta}
    own: dict[str, Any] = {"meta": meta}
    if recording.pinned_messages is not None:
        own["pinned_messages"] = recording.pinned_messages
    return {**root, "extra": {**(root.get("extra") or {}), _OWN: own}}


def _steps(messages: Sequence[Message], untrained: Collection[int]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    open_calls: set[str] = set()
    for number, message in enumerate(messages):
        if message.role == "tool" and message.tool_call_id in open_calls:
            result = {"content": message.content}
            if message.tool_call_id:
                result["source_call_id"] = message.tool_call_id
            steps[-1].setdefault("observation", {"results": []})["results"].append(result)
            continue
        step = {"step_id": len(steps) + 1, **_spoken(message)}
        if number in untrained:
            step["is_copied_context"] = True
        steps.append(step)
        # An answer that names no call belongs to the calls right before it.
        open_calls = {"", *(call.call_id for call in message.tool_calls)}
        if not message.tool_calls:
            open_calls = set()
    return steps


def _spoken(message: Message) -> dict[str, Any]:
    step: dict[str, Any] = {"source": _SPEAKERS[message.role], "message": message.content}
    if message.reasoning:
        step["reasoning_content"] = message.reasoning
    if message.tool_calls:
        step["tool_calls"] = [
            {
                "tool_call_id": call.call_id,
                "function_name": call.name,
                "arguments": call.arguments,
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        step["extra"] = {_OWN: {"tool_call_id": message.tool_call_id}}
    return step


def _matches(value: Any) -> bool:
    return isinstance(value, dict) and _is_atif(value)


def _read(record: Record) -> Recording:
    value, place = record.value, record.place
    messages: list[Message] = []
    copied: list[int] = []
    for where, step in objects(value, "steps", place):
        added = _step(step, where)
        if step.get("is_copied_context"):
            copied += range(len(messages), len(messages) + len(added))
        messages += added
    meta = {key: item for key, item in value.items() if key not in ("steps", "session_id")}
    own = _own(value, place)
    if "meta" in own:
        meta = dict(need(own, "meta", dict, f"{place}: extra.{_OWN}"))
    pinned = own.get("pinned_messages")
    if pinned is not None:
        pinned = need(own, "pinned_messages", int, f"{place}: extra.{_OWN}")
    return Recording(
        source=place,
        recording_id=str(value.get("session_id") or record.name),
        messages=tuple(messages),
        pinned_messages=pinned,
        untrained=tuple(copied),
        meta=meta,
    )


def _own(value: dict[str, Any], place: str) -> dict[str, Any]:
    """What we wrote into the free field of a document or a step."""
    extra = value.get("extra")
    if not isinstance(extra, dict) or _OWN not in extra:
        return {}
    own: dict[str, Any] = need(extra, _OWN, dict, f"{place}: extra")
    return own


def _step(step: dict[str, Any], place: str) -> list[Message]:
    role = read_role(need(step, "source", str, place), "source", place, _SOURCES)
    content, thinking = read_content(need(step, "message", (str, list), place), "message", place)
    if "tool_call_id" in (own := _own(step, place)):
        call_id = need(own, "tool_call_id", str, f"{place}: extra.{_OWN}")
        return [Message("tool", content, tool_call_id=call_id)]
    reasoning = need(step, "reasoning_content", str, place) if step.get("reasoning_content") else ""
    calls = _calls(step, place) if step.get("tool_calls") else ()
    observed = need(step, "observation", dict, place) if step.get("observation") else None
    results = objects(observed, "results", f"{place}: observation") if observed else ()
    answers = [_result(result, bool(calls), where) for where, result in results]
    if role != "assistant" and answers and not content:
        return answers
    return [Message(role, content, reasoning or thinking, calls), *answers]


def _calls(step: dict[str, Any], place: str) -> tuple[ToolCall, ...]:
    return tuple(
        ToolCall(
            need(call, "function_name", str, where),
            read_arguments(need(call, "arguments", (dict, str), where), where),
            call.get("tool_call_id") or "",
        )
        for where, call in objects(step, "tool_calls", place)
    )


def _result(result: dict[str, Any], called: bool, place: str) -> Message:
    content, _ = read_content(result.get("content"), "content", place)
    delegated = result.get("subagent_trajectory_ref")
    if delegated:
        content = "\n".join(filter(None, [content, json.dumps(delegated, ensure_ascii=False)]))
    call_id = result.get("source_call_id") or ""
    return Message("tool" if called or call_id else "user", content, tool_call_id=call_id)


ATIF = Format("atif", _matches, _read)
