"""ShareGPT: {"conversations": [{"from": "human", "value": "..."}]}, JSON or JSONL."""

import json
from typing import Any

from klong_jax.core.message import Message, ToolCall
from klong_jax.text.formats.base import Format, Record, Recording, need, objects, reject
from klong_jax.text.formats.openai import read_arguments, read_role

_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def _matches(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("conversations"), list)


def _read(record: Record) -> Recording:
    value, place = record.value, record.place
    messages = [_message(item, at) for at, item in objects(value, "conversations", place)]
    if value.get("system"):
        messages.insert(0, Message("system", need(value, "system", str, place)))
    return Recording(
        source=place,
        recording_id=str(value.get("id") or record.name),
        messages=tuple(messages),
        meta={k: v for k, v in value.items() if k not in ("conversations", "system", "id")},
    )


def _message(item: dict[str, Any], place: str) -> Message:
    speaker = need(item, "from", str, place)
    role = read_role(speaker, "from", place, _SPEAKERS)
    text = need(item, "value", str, place)
    if speaker != "function_call":
        return Message(role, text)
    try:
        decoded = json.loads(text)
    except json.JSONDecodeError as error:
        reject(place, f"field 'value' of a function_call is not valid JSON ({error.msg})")
    calls = decoded if isinstance(decoded, list) else [decoded]
    return Message(
        role,
        "",
        tool_calls=tuple(
            ToolCall(need(call, "name", str, place), read_arguments(call.get("arguments"), place))
            for call in calls
        ),
    )


SHAREGPT = Format("sharegpt", _matches, _read)
