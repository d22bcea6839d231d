"""SWE-agent's .traj: `history` is what the model was told, `trajectory` what was executed.

The history is preferred. It stops at the agent's last message, so the observation of the last step
is taken from the trajectory. Without a history the messages are rebuilt from the steps.
"""

from typing import Any

from klong_jax.core.message import Message
from klong_jax.text.formats.base import Format, Record, Recording, need, objects, reject
from klong_jax.text.formats.openai import read_content, read_message


def _matches(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    history, steps = value.get("history"), value.get("trajectory")
    return _first_has(history, "role") or (_first_has(steps, "observation") and not history)


def _first_has(items: Any, key: str) -> bool:
    return (
        isinstance(items, list) and bool(items) and isinstance(items[0], dict) and key in items[0]
    )


def _read(record: Record) -> Recording:
    value, place = record.value, record.place
    messages = (
        [_message(item, where) for where, item in objects(value, "history", place)]
        if (value.get("history"))
        else _opening(value, place)
    )
    steps = list(objects(value, "trajectory", place)) if value.get("trajectory") else []
    if not value.get("history"):
        for where, step in steps:
            messages += [_response(step, where), _observation(step, where)]
    elif steps and messages[-1].role == "assistant":
        last = _observation(steps[-1][1], steps[-1][0])
        messages += [last] if last.content else []
    return Recording(
        source=place,
        recording_id=str(value.get("instance_id") or record.name),
        messages=tuple(messages),
        meta={key: item for key, item in value.items() if key not in ("history", "trajectory")},
    )


def _message(item: dict[str, Any], place: str) -> Message:
    """A history message: OpenAI's fields, but a list of call ids and thinking in blocks."""
    value = dict(item)
    ids = value.get("tool_call_ids") or []
    if value.get("role") == "tool" and ids:
        if len(ids) > 1:
            reject(place, f"field 'tool_call_ids' names {len(ids)} calls for one answer")
        value["tool_call_id"] = ids[0]
    if value.get("thinking_blocks"):
        _, value["reasoning"] = read_content(value["thinking_blocks"], "thinking_blocks", place)
    return read_message(value, place)


def _opening(value: dict[str, Any], place: str) -> list[Message]:
    """What the model was told before its first step, where the step carries its query."""
    first = need(value, "trajectory", list, place)[:1]
    if not first or not isinstance(first[0], dict) or not first[0].get("query"):
        return []
    where = f"{place}: trajectory[0]"
    return [_message(item, at) for at, item in objects(first[0], "query", where)]


def _response(step: dict[str, Any], place: str) -> Message:
    need(step, "response", str, place)
    return _message(
        {
            "role": "assistant",
            "content": step["response"],
            "tool_calls": step.get("tool_calls"),
            "thinking_blocks": step.get("thinking_blocks"),
        },
        place,
    )


def _observation(step: dict[str, Any], place: str) -> Message:
    content = need(step, "observation", str, place)
    role = "tool" if step.get("tool_calls") else "user"
    return _message(
        {"role": role, "content": content, "tool_call_ids": step.get("tool_call_ids")}, place
    )


SWE_AGENT = Format("swe-agent", _matches, _read)
