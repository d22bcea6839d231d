"""What is said in an interaction: chat messages and the tool calls they carry."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class ToolCall:
    """One tool call of an assistant message.

    Attributes:
        name: The tool's name.
        arguments: Its arguments, a JSON object.
        call_id: The identifier a chat-completions protocol pairs the result with; may be empty.
    """

    name: str
    arguments: dict[str, Any]
    call_id: str = ""

    def to_json(self) -> dict[str, Any]:
        """The call as a JSON object."""
        return {"name": self.name, "arguments": self.arguments, "call_id": self.call_id}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "ToolCall":
        """Reads what `to_json` wrote."""
        return ToolCall(value["name"], value["arguments"], value.get("call_id", ""))


@dataclass(frozen=True)
class Message:
    """One chat message.

    Attributes:
        role: Who speaks.
        content: The text; empty when an assistant only calls tools.
        reasoning: An assistant's thinking, where the model gives it apart.
        tool_calls: The calls of an assistant message.
        tool_call_id: For a tool's answer, the call it answers; may be empty.
    """

    role: Role
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = field(default=())
    tool_call_id: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, not {self.role!r}")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"only an assistant message carries tool calls, not {self.role!r}")

    def to_json(self) -> dict[str, Any]:
        """The message as a JSON object; empty fields are left out."""
        value: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            value["reasoning"] = self.reasoning
        if self.tool_calls:
            value["tool_calls"] = [call.to_json() for call in self.tool_calls]
        if self.tool_call_id:
            value["tool_call_id"] = self.tool_call_id
        return value

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Message":
        """Reads what `to_json` wrote."""
        return Message(
            role=value["role"],
            content=value["content"],
            reasoning=value.get("reasoning", ""),
            tool_calls=tuple(ToolCall.from_json(call) for call in value.get("tool_calls", ())),
            tool_call_id=value.get("tool_call_id", ""),
        )
