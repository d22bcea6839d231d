"""A model's turn made usable: calls written as text are read, tokens are found where none came."""

import json
from dataclasses import replace

from klong_jax.core.message import ToolCall
from klong_jax.llm.base import Completion
from klong_jax.text.chat import parse_output
from klong_jax.text.dialect import Dialect


def spoken(completion: Completion) -> Completion:
    """The completion with calls that a remote model wrote as text, and without unusable ones."""
    message, problem = completion.message, completion.problem
    if not message.tool_calls and not problem and "<tool_call>" in message.content:
        parsed = parse_output(message.content)
        message, problem = parsed.message, parsed.problem
        if problem:  # what was said stands, since it is tokenised from the message
            message = completion.message
    usable = tuple(call for call in message.tool_calls if _encodable(call))
    if len(usable) < len(message.tool_calls):
        message = replace(message, tool_calls=usable)
        problem = problem or "The tool call holds half a surrogate pair; write plain text."
    return replace(completion, message=message, problem=problem)


def output_ids(chat: Dialect, completion: Completion) -> tuple[int, ...]:
    """The sampled tokens; of a model that gives none, what the dialect would have sampled."""
    if completion.output_ids:
        return completion.output_ids
    ids = tuple(chat.output_ids(completion.message))
    if completion.finish_reason == "length":
        return ids[: len(ids) - len(chat.cut_ids)]
    return ids


def _encodable(call: ToolCall) -> bool:
    try:
        json.dumps(call.to_json(), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
