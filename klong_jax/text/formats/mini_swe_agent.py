"""mini-swe-agent: plain chat messages whose actions are fenced shell blocks.

A bare list, or {"messages": [...], "info": {...}, "trajectory_format": "mini-swe-agent-1"}. The
closing message of role "exit" is the submission, not a part of the conversation.
"""

from typing import Any

from klong_jax.text.formats.base import Format, Record, Recording, need, objects
from klong_jax.text.formats.openai import read_message

_FENCES = ("```bash\n", "```mswea_bash_command\n")


def _matches(value: Any) -> bool:
    if isinstance(value, dict):
        return str(value.get("trajectory_format", "")).startswith("mini-swe-agent")
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return False
    spoken = [item.get("content") for item in value if item.get("role") == "assistant"]
    return bool(spoken) and all(
        isinstance(text, str) and any(fence in text for fence in _FENCES) for text in spoken
    )


def _read(record: Record) -> Recording:
    value = {"messages": record.value} if isinstance(record.value, list) else record.value
    meta = {key: item for key, item in value.items() if key != "messages"}
    messages = []
    for place, item in objects(value, "messages", record.place):
        if item.get("role") == "exit":
            meta["submission"] = need(item, "content", str, place)
        else:
            messages.append(read_message(item, place))
    return Recording(
        source=record.place,
        recording_id=str(value.get("instance_id") or record.name),
        messages=tuple(messages),
        meta=meta,
    )


MINI_SWE_AGENT = Format("mini-swe-agent", _matches, _read)
