"""GLM's syntax of tool calls: a name, then a line a key and a line a value."""

import json
import re
from typing import Any

from klong_jax.core.message import ToolCall

_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_SHAPE = (
    "write NAME, then <arg_key>KEY</arg_key> and <arg_value>VALUE</arg_value> for each argument, "
    "between <tool_call> and </tool_call>"
)


def parse_glm_call(block: str, call_id: str) -> tuple[ToolCall | None, str]:
    """Reads what stands between <tool_call> and </tool_call>.

    Args:
        block: The text.
        call_id: The identifier that the call gets.

    Returns:
        The call, or None and one sentence on what is malformed. A value is text, unless it reads as
        JSON of another kind: the syntax does not tell the number 5 from the text "5".
    """
    name, opened, rest = block.partition("<arg_key>")
    rest = opened + rest
    arguments: dict[str, Any] = {}
    while found := _ARGUMENT.match(rest):
        arguments[found.group(1).strip()] = _value(found.group(2))
        rest = rest[found.end() :]
    if rest.strip() or not name.strip() or "\n" in name.strip():
        return None, f"The tool call is malformed; {_SHAPE}."
    return ToolCall(name.strip(), arguments, call_id), ""


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return text if isinstance(value, str) else value
