"""ATIF, the agent trajectory interchange format, up to version 1.6.

A step of source system or user is one message. A step of source agent is an assistant message
followed by the results of its calls. Steps marked `is_copied_context` repeat what an earlier
trajectory already said; they are read like any other and listed in `meta["copied_context"]`.
"""

import json
from typing import Any

from klong_jax.core.message import Message, ToolCall
from klong_jax.text.formats.base import Format, Record, Recording, need, objects
from klong_jax.text.formats.openai import read_arguments, read_content, read_role

_SOURCES = {"system": "system", "user": "user", "agent": "assistant"}


def _matches(value: Any) -> bool:
    return isinstance(value, dict) and str(value.get("schema_version", "")).startswith("ATIF")


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
    if copied:
        meta["copied_context"] = copied
    return Recording(
        source=place,
        recording_id=str(value.get("session_id") or record.name),
        messages=tuple(messages),
        meta=meta,
    )


def _step(step: dict[str, Any], place: str) -> list[Message]:
    role = read_role(need(step, "source", str, place), "source", place, _SOURCES)
    content, thinking = read_content(need(step, "message", (str, list), place), "message", place)
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
