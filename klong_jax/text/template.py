"""A model's own chat template: read from its folder, rendered, and encoded without forgery.

What a message says must not become the template's own special tokens. So where a text spells one,
it is put between two marks before the template sees it, and when the rendered text is encoded, what
stands between marks is encoded as plain text. A template can cut, trim and compare marked texts as
it would the texts themselves, since nothing else about them changes; that this held is verified.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import read_json
from klong_jax.core.message import Message
from klong_jax.text.tokenizer import Tokenizer

# Two of Unicode's noncharacters, which no text that is exchanged holds.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_OPEN}(.+?){_CLOSE}", re.DOTALL)
_VARIABLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# What Llama's templates fall back to. A clock would make another prompt of a recording every day.
_TODAY = datetime(2024, 7, 26)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template as a model's folder holds it.

    Attributes:
        source: The Jinja text.
        name: The file it was read from, for messages.
        variables: The special tokens that it may name, such as bos_token.
    """

    source: str
    name: str
    variables: dict[str, str] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled is code, which does not travel to other processes.
        return {name: value for name, value in vars(self).items() if name != "compiled"}

    @cached_property
    def compiled(self) -> jinja2.Template:
        """The template in the sandbox that transformers renders it in.

        Raises:
            UserError: It is not valid Jinja.
        """
        # Imported on use: it takes most of a second. The public render function beside it takes
        # plain data only, which a fixed date is not.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            template: jinja2.Template = _compile_jinja_template(self.source)
        except jinja2.TemplateError as error:
            raise UserError(
                f"{self.name}: the chat template is not valid Jinja ({_line(error)}); mend it."
            ) from None
        return template


def load_template(folder: Path) -> ChatTemplate:
    """Reads the chat template of a model's folder.

    Args:
        folder: Holds chat_template.jinja, or tokenizer_config.json with `chat_template`.

    Raises:
        UserError: There is no template; the message names the folder and the remedy.
    """
    settings, config = folder / "tokenizer_config.json", dict[str, Any]()
    if settings.exists():
        config = read_json(settings)
    named = ((name, config.get(name)) for name in _VARIABLES)
    variables = {
        name: str(value["content"] if isinstance(value, dict) else value)
        for name, value in named
        if value
    }
    alone = folder / "chat_template.jinja"
    if alone.exists():
        return ChatTemplate(alone.read_text(encoding="utf-8"), str(alone), variables)
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not isinstance(source, str):
        raise UserError(
            f"{folder}: has no chat template, neither chat_template.jinja nor one in "
            "tokenizer_config.json; add it or set tokenizer.template=chatml."
        )
    return ChatTemplate(source, str(settings), variables)


class Renderer:
    """Renders messages through a template to marked text, and encodes marked text.

    Added tokens that a tokenizer does not flag as special are ordinary vocabulary in messages too.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer
        names = sorted({*tokenizer.specials, _OPEN, _CLOSE}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)))

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The conversation as the template writes it, special tokens in messages marked.

        Args:
            messages: The conversation so far.
            prompt: Whether the generation prompt follows.

        Raises:
            UserError: The template refuses the conversation.
        """
        plain = [_as_template_sees(message) for message in messages]
        marked = self._mark(plain)
        text = self._write(marked, prompt)
        if marked != plain and unmark(text) != self._write(plain, prompt):
            raise UserError(
                f"{self.template.name}: the chat template takes a special token apart that a "
                "message spells; remove it there or set tokenizer.template=chatml."
            )
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of a marked text."""
        ids: list[int] = []
        # The split alternates: the template's own text, a marked text, and so on.
        for number, part in enumerate(_MARKED.split(text)):
            ids += self.tokenizer.encode(part, specials=number % 2 == 0) if part else []
        return ids

    def opening_special(self, text: str) -> str:
        """The special token that a text begins with; empty if there is none."""
        found = self._special.match(text)
        return found.group() if found and found.group() not in (_OPEN, _CLOSE) else ""

    def _write(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        try:
            return self.template.compiled.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                strftime_now=_TODAY.strftime,
                **self.template.variables,
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.template.name}: the chat template refuses the conversation "
                f"({_line(error)}); change the data or set tokenizer.template=chatml."
            ) from None

    def _mark(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(f"{_OPEN}\\g<0>{_CLOSE}", value)
        if isinstance(value, list):
            return [self._mark(item) for item in value]
        if isinstance(value, dict):
            return {self._mark(key): self._mark(item) for key, item in value.items()}
        return value


def unmark(text: str) -> str:
    """A marked text as it reads."""
    return _MARKED.sub("\\1", text)


def _as_template_sees(message: Message) -> dict[str, Any]:
    """The message in the form that chat templates are written for."""
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        value["reasoning_content"] = message.reasoning
    if message.tool_calls:
        value["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {
                    "name": call.name,
                    # Through JSON and back: the template gets plain data, as from a file.
                    "arguments": json.loads(json.dumps(call.arguments)),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        value["tool_call_id"] = message.tool_call_id
    return value


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
