"""A conversation as tokens, in Qwen3's dialect of ChatML with Hermes tool calls, without thinking.

Tokens are only ever appended: what was sampled is never rendered again, so the policy trains on
exactly the tokens it produced. The text of messages is encoded apart from the template, so that a
document that spells a special token cannot end a turn.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from klong_jax.core.message import Message, ToolCall
from klong_jax.core.trajectory import Turn
from klong_jax.text.dialect import ParsedOutput
from klong_jax.text.tokenizer import Tokenizer

END_OF_TURN = "<|im_end|>"
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_THINK = re.compile(r"^\s*<think>(.*?)</think>\s*", re.DOTALL)

# What stands in a <tool_call> and the identifier it gets; gives the call or what is wrong with it.
ParseCall = Callable[[str, str], tuple[ToolCall | None, str]]


class Chat:
    """The dialect itself: renders messages and turns to tokens, and parses sampled text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def prompt_ids(self) -> tuple[int, ...]:
        """The generation prompt that opens an assistant turn."""
        return tuple(self._template("<|im_start|>assistant\n"))

    @cached_property
    def end_id(self) -> int:
        """The token that ends a turn; the last one where the tokenizer has to spell it."""
        return self._template(END_OF_TURN)[-1]

    @cached_property
    def cut_ids(self) -> tuple[int, ...]:
        """Closes a turn that was cut before its end-of-turn token."""
        return tuple(self._template(END_OF_TURN))

    def environment_ids(self, messages: Sequence[Message], *, after_output: bool) -> list[int]:
        """Tokens of closed environment messages, the generation prompt not included.

        Args:
            messages: System, user and tool messages in order.
            after_output: Whether an assistant turn comes right before, whose line must end.
        """
        ids = self._template("\n") if after_output else []
        for position, message in enumerate(messages):
            if message.role != "tool":
                ids += self._template(f"<|im_start|>{message.role}\n") + self._text(message.content)
                ids += self._template("<|im_end|>\n")
                continue
            first = position == 0 or messages[position - 1].role != "tool"
            last = position + 1 == len(messages) or messages[position + 1].role != "tool"
            ids += self._template("<|im_start|>user" if first else "")
            ids += self._template("\n<tool_response>\n") + self._text(message.content)
            ids += self._template("\n</tool_response>" + ("<|im_end|>\n" if last else ""))
        return ids

    def output_ids(self, message: Message) -> list[int]:
        """Tokens an assistant would have sampled to say `message`, the end of the turn included."""
        ids: list[int] = []
        if message.reasoning:
            ids += self._template("<think>\n") + self._text(message.reasoning)
            ids += self._template("\n</think>\n\n")
        ids += self._text(message.content)
        for number, call in enumerate(message.tool_calls):
            body = {"name": call.name, "arguments": call.arguments}
            ids += self._template(("\n" if message.content or number else "") + "<tool_call>\n")
            ids += self._text(json.dumps(body, ensure_ascii=False))
            ids += self._template("\n</tool_call>")
        return ids + self._template(END_OF_TURN)

    def parse(self, ids: Iterable[int]) -> ParsedOutput:
        """Reads sampled tokens as an assistant message."""
        return parse_output(self.tokenizer.decode(ids))

    def turns(
        self, messages: Sequence[Message], pinned_messages: int
    ) -> tuple[tuple[Turn, ...], int]:
        """A recorded conversation as turns.

        Args:
            messages: The whole conversation; what follows the last assistant message is dropped,
                because nothing was said in its sight.
            pinned_messages: How many messages at the front every window keeps.

        Returns:
            The turns, and the length of the pinned prefix in tokens.
        """
        turns: list[Turn] = []
        pending: list[Message] = []
        prefix_len = position = 0
        for number, message in enumerate(messages):
            if message.role != "assistant":
                pending.append(message)
                if number + 1 == pinned_messages:
                    prefix_len = position + len(
                        self.environment_ids(pending, after_output=bool(turns))
                    )
                continue
            suffix = self.environment_ids(pending, after_output=bool(turns))
            turn = Turn((*suffix, *self.prompt_ids), tuple(self.output_ids(message)))
            position += len(turn.suffix_ids) + len(turn.output_ids)
            turns.append(turn)
            pending = []
            if number + 1 == pinned_messages:
                prefix_len = position
        return tuple(turns), prefix_len

    def _template(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, specials=True) if text else []

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, specials=False) if text else []


def parse_output(text: str, parse_call: ParseCall | None = None) -> ParsedOutput:
    """Reads an assistant's text: thinking, content and tool calls.

    A malformed call never raises: the sampled turn stands, and the problem is told to the model.

    Args:
        text: What the assistant said.
        parse_call: Reads what stands in a <tool_call>; Hermes' JSON if not given.
    """
    text = text.removesuffix(END_OF_TURN)
    reasoning = ""
    if thought := _THINK.match(text):
        reasoning, text = thought.group(1).strip(), text[thought.end() :]
    calls: list[ToolCall] = []
    problem = ""
    for number, block in enumerate(_CALL.findall(text)):
        call, complaint = (parse_call or _parse_call)(block, f"call_{number}")
        if call:
            calls.append(call)
        problem = problem or complaint
    content = _CALL.sub("", text).strip()
    return ParsedOutput(Message("assistant", content, reasoning, tuple(calls)), problem)


def _parse_call(block: str, call_id: str) -> tuple[ToolCall | None, str]:
    shape = 'write {"name": ..., "arguments": {...}} between <tool_call> and </tool_call>'
    try:
        value = json.loads(block)
    except json.JSONDecodeError as error:
        return None, f"The tool call is not valid JSON ({error.msg}); {shape}."
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None, f"The tool call has no name; {shape}."
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return None, f"The tool call's arguments are not an object; {shape}."
    return ToolCall(value["name"], arguments, call_id), ""
