"""OpenAI chat messages, one conversation a JSONL line or a bare list; the format we write.

A line is {"messages": [...]} and whatever else its author keeps. Our own keys are `id`,
`pinned_messages` and `meta`. A message of `weight` 0 is shown but not trained, as in OpenAI's own
fine-tuning.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from klong_jax.core.jsonio import write_text
from klong_jax.core.message import ROLES, Message, Role, ToolCall
from klong_jax.text.formats.base import Format, Record, Recording, kind_of, need, objects, reject

_ROLE_NAMES: dict[str, str] = {role: role for role in ROLES} | {
    "developer": "system",
    "function": "tool",
}
# A content part that is not text is kept as its JSON; beyond this it is a payload, not a text.
_PART_LIMIT = 2_000


def read_messages(value: Any, key: str, place: str) -> tuple[Message, ...]:
    """Reads the list of OpenAI messages that a field holds."""
    return tuple(read_message(item, where) for where, item in objects(value, key, place))


def read_message(value: dict[str, Any], place: str) -> Message:
    """Reads one OpenAI message.

    Raises:
        UserError: A field is missing or unusable; names place and field.
    """
    role = read_role(need(value, "role", str, place), "role", place)
    calls = _tool_calls(value, place)
    if value.get("content") is None and not (calls or value.get("refusal")):
        # A silent message is possible, a message without a content field is a slip.
        need(value, "content", (str, list, type(None)), place)
    content, thinking = read_content(value.get("content"), "content", place)
    if calls and role != "assistant":
        reject(place, f"field 'tool_calls' belongs to an assistant message, not to {role!r}")
    given = value.get("reasoning_content") or value.get("reasoning") or ""
    if not isinstance(given, str):
        reject(place, f"field 'reasoning' must be text, not {kind_of(given)}")
    return Message(
        role=role,
        content=content or value.get("refusal") or "",
        reasoning=given or thinking,
        tool_calls=calls,
        tool_call_id=_optional_text(value, "tool_call_id", place),
    )


def read_role(name: str, key: str, place: str, names: dict[str, str] = _ROLE_NAMES) -> Role:
    """The role a format's name for a speaker stands for."""
    if name not in names:
        reject(place, f"field {key!r} must be one of {', '.join(names)}, not {name!r}")
    return names[name]  # type: ignore[return-value]  # every table maps into Role


def read_content(value: Any, key: str, place: str) -> tuple[str, str]:
    """Reads message content: text, or a list of parts.

    Returns:
        The text, and the thinking that its parts carry. Parts that are neither are kept as JSON.

    Raises:
        UserError: The content is of another type, or holds a payload such as an inlined image.
    """
    if value is None or isinstance(value, str):
        return value or "", ""
    if not isinstance(value, list):
        reject(place, f"field {key!r} must be text or a list of parts, not {kind_of(value)}")
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(value):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and isinstance(part.get("thinking"), str):
            thoughts.append(part["thinking"])
        else:
            kept = json.dumps(part, ensure_ascii=False)
            if len(kept) > _PART_LIMIT:
                reject(place, f"field {key}[{index}] holds {len(kept)} characters that are no text")
            texts.append(kept)
    return "\n".join(texts), "\n".join(thoughts)


def read_arguments(value: Any, place: str) -> dict[str, Any]:
    """Reads a call's arguments: a JSON object, or the text of one."""
    decoded = value
    if isinstance(value, str):
        try:
            decoded = json.loads(value) if value.strip() else {}
        except json.JSONDecodeError as error:
            reject(place, f"field 'arguments' is not valid JSON ({error.msg})")
    if not isinstance(decoded, dict):
        reject(place, f"field 'arguments' must be a JSON object, not {kind_of(decoded)}")
    return decoded


def message_to_openai(message: Message) -> dict[str, Any]:
    """The message in OpenAI's wire form."""
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        value["reasoning_content"] = message.reasoning
    if message.tool_calls:
        value["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        value["tool_call_id"] = message.tool_call_id
    return value


def write_openai_jsonl(path: Path, recordings: Iterable[Recording]) -> None:
    """Writes recordings as OpenAI messages JSONL; `read_recordings` gives them back."""
    rows = []
    for recording in recordings:
        row: dict[str, Any] = {"id": recording.recording_id}
        if recording.pinned_messages is not None:
            row["pinned_messages"] = recording.pinned_messages
        if recording.meta:
            row["meta"] = recording.meta
        row["messages"] = [message_to_openai(message) for message in recording.messages]
        for number in recording.untrained:
            row["messages"][number]["weight"] = 0
        # ASCII, because recorded tool output may hold half a surrogate pair, which UTF-8 cannot.
        rows.append(json.dumps(row) + "\n")
    write_text(path, "".join(rows))


def _tool_calls(value: dict[str, Any], place: str) -> tuple[ToolCall, ...]:
    if value.get("function_call"):
        function = need(value, "function_call", dict, place)
        return (_function(function, "", f"{place}: function_call"),)
    if not value.get("tool_calls"):
        return ()
    return tuple(
        _function(need(call, "function", dict, where), call.get("id") or "", where)
        for where, call in objects(value, "tool_calls", place)
    )


def _function(function: dict[str, Any], call_id: str, place: str) -> ToolCall:
    name = need(function, "name", str, place)
    return ToolCall(name, read_arguments(function.get("arguments", ""), place), call_id)


def _optional_text(value: dict[str, Any], key: str, place: str) -> str:
    return need(value, key, str, place) if value.get(key) is not None else ""


def _matches(value: Any) -> bool:
    messages = value.get("messages") if isinstance(value, dict) else value
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) and "role" in message for message in messages[:1])
    )


def _read(record: Record) -> Recording:
    value = {"messages": record.value} if isinstance(record.value, list) else record.value
    messages = read_messages(value, "messages", record.place)
    pinned = value.get("pinned_messages")
    if pinned is not None:
        pinned = need(value, "pinned_messages", int, record.place)
    own = ("id", "messages", "pinned_messages", "meta")
    meta = {key: item for key, item in value.items() if key not in own}
    if "meta" in value:
        meta |= need(value, "meta", dict, record.place)
    return Recording(
        source=record.place,
        recording_id=str(value.get("id") or record.name),
        messages=messages,
        pinned_messages=pinned,
        untrained=tuple(_untrained(value, record.place)),
        meta=meta,
    )


def _untrained(value: dict[str, Any], place: str) -> Iterator[int]:
    for number, (where, message) in enumerate(objects(value, "messages", place)):
        if "weight" in message and message["weight"] not in (0, 1):
            reject(where, f"field 'weight' must be 0 or 1, not {message['weight']!r}")
        if message.get("weight") == 0:
            yield number


OPENAI = Format("openai", _matches, _read)
