"""The chat-completions protocol's JSON: messages out, one assistant message in."""

import json
from collections.abc import Iterable
from typing import Any

from klong_jax.core.message import Message, ToolCall


def to_wire(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as the protocol wants them.

    A window can begin with a tool's answer whose call is out of sight. The protocol refuses such an
    answer, so it is shown as the Hermes dialect shows every answer: as words of the user.
    """
    wire: list[dict[str, Any]] = []
    called: set[str] = set()
    for message in messages:
        if message.role == "assistant":
            called = {call.call_id for call in message.tool_calls}
            wire.append(_assistant(message))
        elif message.role == "tool" and message.tool_call_id in called:
            called.discard(message.tool_call_id)
            answer = {"role": "tool", "tool_call_id": message.tool_call_id}
            wire.append({**answer, "content": message.content})
        elif message.role == "tool":
            text = f"<tool_response>\n{message.content}\n</tool_response>"
            wire.append({"role": "user", "content": text})
        else:
            wire.append({"role": message.role, "content": message.content})
    return wire


def _assistant(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": "assistant", "content": message.content}
    if message.tool_calls:
        value["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return value


def from_wire(value: dict[str, Any]) -> tuple[Message, str]:
    """Reads the assistant message of a response.

    Returns:
        The message, and what was malformed in its calls; such a call stays in the content as the
        Hermes dialect spells it, so that what was said is kept.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: The message is not the protocol's.
    """
    parts = [_text(value.get("content") or "")]
    calls: list[ToolCall] = []
    problem = ""
    for number, item in enumerate(value.get("tool_calls") or ()):
        function = item["function"]
        name, raw = _text(function["name"]), function.get("arguments") or "{}"
        try:
            arguments = raw if isinstance(raw, dict) else json.loads(raw)
        except json.JSONDecodeError as error:
            problem = problem or f"The tool call's arguments are not valid JSON ({error.msg})."
            arguments = None
        if isinstance(arguments, dict):
            calls.append(ToolCall(name, arguments, item.get("id") or f"call_{number}"))
            continue
        problem = problem or "The tool call's arguments are not a JSON object."
        spelled = f'{{"name": {json.dumps(name)}, "arguments": {_text(str(raw))}}}'
        parts.append(f"<tool_call>\n{spelled}\n</tool_call>")
    reasoning = value.get("reasoning_content") or value.get("reasoning") or ""
    content = "\n".join(part for part in parts if part)
    return Message("assistant", content, _text(reasoning), tuple(calls)), problem


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, not {type(value).__name__}")
    # Half a surrogate pair can come over JSON and cannot be encoded.
    return value.encode("utf-8", "replace").decode()
