"""A model's own chat template as a dialect: its pieces, each rendered apart from all others.

A piece is what the template adds to a conversation that ends before it. It is found by rendering a
stand-in conversation with and without it, so the agent can encode what comes without rendering what
has been said, and a recording gets the very pieces that the agent would have had. Whether they add
up to what the template makes of a whole conversation is verified for every recording (see
`klong_jax.text.template_turns`).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Literal

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message, ToolCall
from klong_jax.core.trajectory import Turn
from klong_jax.text.chat import parse_output
from klong_jax.text.dialect import ParsedOutput
from klong_jax.text.glm_calls import parse_glm_call
from klong_jax.text.template import ChatTemplate, Renderer, unmark
from klong_jax.text.template_turns import template_turns
from klong_jax.text.tokenizer import Tokenizer

Thinking = Literal["keep", "strip"]

# What a template may lay out anew without leaving anything out.
_LAYOUT = re.compile(r"\s|</?think>")

# The stand-ins; the word says in a rendered text where the stand-in's own text ends.
_WORD = "plugh"
_USER = Message("user", "x")
_ANSWER = Message("assistant", _WORD)
_CALL = Message("assistant", "", tool_calls=(ToolCall("act", {"on": _WORD}, "000000000"),))
_RESULT = Message("tool", "x", tool_call_id="000000000")


class TemplateChat:
    """The dialect that a chat template defines; see `klong_jax.text.dialect.Dialect`.

    Attributes:
        tokenizer: The tokenizer of the pieces.
        renderer: The template.
        thinking: keep shows later turns the thinking of earlier ones as it was said, whatever the
            template does, which is what an agent meets that appends tokens; strip shows them what
            the template shows, in a new window where that is not what was there before.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, thinking: Thinking = "keep"
    ) -> None:
        self.tokenizer = tokenizer
        self.thinking = thinking
        self.renderer = Renderer(template, tokenizer)

    @property
    def name(self) -> str:
        """The template's file, for messages."""
        return self.renderer.template.name

    @cached_property
    def prompt_ids(self) -> tuple[int, ...]:
        """The generation prompt that opens an assistant turn."""
        return tuple(self.renderer.encode(self.prompt))

    @cached_property
    def end_id(self) -> int:
        """The token that ends a turn; the last one where the tokenizer has to spell it.

        Raises:
            UserError: Turns end with the token that opens the next message, whichever that is.
        """
        return self.cut_ids[-1]

    @cached_property
    def cut_ids(self) -> tuple[int, ...]:
        """Closes a turn that was cut before its end-of-turn token.

        Raises:
            UserError: As for `end_id`.
        """
        if not self.end:
            raise UserError(
                f"{self.name}: ends a turn with whatever token opens the next message, so it is "
                "for klong split and klong sft only; set tokenizer.template=chatml."
            )
        return tuple(self.renderer.encode(self.end))

    def environment_ids(self, messages: Sequence[Message], *, after_output: bool) -> list[int]:
        """Tokens of closed environment messages, the generation prompt not included.

        Args:
            messages: System, user and tool messages in order.
            after_output: Whether an assistant turn comes right before; what the template writes
                between its end and the first message is part of the tokens then.
        """
        text = self.environment(messages, after_output=after_output)
        if after_output and messages:
            text = text.removeprefix(self.terminator(messages[0].role))
        return self.renderer.encode(text)

    def output_ids(self, message: Message) -> list[int]:
        """Tokens an assistant would have sampled to say `message`, the end of the turn included."""
        follower = "tool" if message.tool_calls else "user"
        return self.renderer.encode(self.said(message) + self.terminator(follower))

    def parse(self, ids: Iterable[int]) -> ParsedOutput:
        """Reads sampled tokens as an assistant message.

        Raises:
            UserError: The template writes tool calls in a syntax that is not known here.
        """
        text = self.tokenizer.decode(ids)
        for end in (self.end, self.terminator("tool"), self.terminator("user")):
            text = text.removesuffix(end)
        call = unmark(self.said(_CALL))
        if "<arg_key>" in call:
            return parse_output(text, parse_glm_call)
        if "<tool_call>" in call:
            return parse_output(text)
        raise UserError(
            f"{self.name}: writes tool calls in a syntax that klong does not read, so it is for "
            "klong split and klong sft only; set tokenizer.template=chatml."
        )

    def check_acting(self) -> None:
        """Refuses what an agent cannot act in.

        Raises:
            UserError: Names what stands in its way.
        """
        if self.thinking == "strip":
            raise UserError(
                f"{self.name}: the policy was trained under tokenizer.thinking=strip, while an "
                "agent keeps what was said; train it under tokenizer.thinking=keep."
            )
        _ = self.end_id, self.parse(())

    def turns(
        self, messages: Sequence[Message], pinned_messages: int
    ) -> tuple[tuple[Turn, ...], int]:
        """A recorded conversation as turns, verified against the whole rendered.

        Args:
            messages: The whole conversation; what follows the last assistant message is dropped.
            pinned_messages: How many messages at the front every window keeps.

        Returns:
            The turns, and the length of the pinned prefix in tokens. A turn whose context does not
            extend the one before begins a new window and says why in `restart`.

        Raises:
            UserError: The template refuses the conversation, or what it shows changes as the
                conversation goes on in a way that the policy does not allow; names the turn.
        """
        return template_turns(self, messages, pinned_messages)

    def left_out(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The turns of which the template never shows words, thinking or calls.

        They are trained without them, since the model could not see them either.
        """
        said = [message for message in messages if message.role == "assistant"]
        return tuple(number for number, message in enumerate(said) if self._loses(message))

    def _loses(self, message: Message) -> bool:
        text = _LAYOUT.sub("", unmark(self.said(message)))
        parts = (message.content, message.reasoning, *(call.name for call in message.tool_calls))
        return any(_LAYOUT.sub("", part) not in text for part in parts)

    @cached_property
    def prompt(self) -> str:
        """The generation prompt as text."""
        return self._added(self.renderer.render([_USER]), self._asked)

    @cached_property
    def end(self) -> str:
        """What the template closes every assistant turn with; empty if it does not."""
        return self._closing(_ANSWER)[0]

    def terminator(self, role: str) -> str:
        """The token that a turn ends with before a message of `role`, where `end` is empty.

        The model samples it to stop, so it is the turn's; the template writes it as the opening of
        the message.
        """
        if self.end or role not in ("user", "tool"):
            return ""
        opening = [_USER if role == "user" else _RESULT]
        token = self.renderer.opening_special(self.environment(opening, after_output=True))
        if not token:
            raise UserError(
                f"{self.name}: writes nothing after an assistant's turn that the tokenizer has as "
                "a special token, so that no turn would end; set tokenizer.template=chatml."
            )
        return token

    def environment(self, messages: Sequence[Message], *, after_output: bool) -> str:
        """Marked text of what `environment_ids` encodes, a turn's terminator still before it."""
        if not after_output:
            return self.renderer.render(messages) if messages else ""
        called = bool(messages) and messages[0].role == "tool" and self._shows_calls
        stand_in = _CALL if called else _ANSWER
        closing, trailing = self._closing(stand_in)
        if not messages:
            return trailing
        shown = self.renderer.render([_USER, stand_in, *messages])
        return self._added(closing, shown.partition(_WORD)[2])

    def said(self, message: Message) -> str:
        """Marked text of an assistant's turn as the template shows it while it is the last."""
        text = self._added(self._asked, self.renderer.render([_USER, message]))
        return text.rstrip() if self.end else text

    def forms(self, message: Message) -> Iterator[str]:
        """The marked texts in which the template may show a turn: last, answered, and past."""
        yield self.said(message)
        for follower in (_RESULT, _USER):
            try:
                shown = self.renderer.render([_USER, message, follower])
            except UserError:
                continue
            after = self.environment([follower], after_output=True)
            if shown.startswith(self._asked) and shown.endswith(after):
                yield shown[len(self._asked) : len(shown) - len(after)]

    @cached_property
    def _asked(self) -> str:
        return self.renderer.render([_USER], prompt=True)

    def _closing(self, stand_in: Message) -> tuple[str, str]:
        """What follows the stand-in's word in its own turn, and the blank text after that."""
        _, shown, text = self.renderer.render([_USER, stand_in]).partition(_WORD)
        if not shown:
            raise UserError(
                f"{self.name}: the chat template does not show what an assistant says; mend it or "
                "set tokenizer.template=chatml."
            )
        return text.rstrip(), text[len(text.rstrip()) :]

    @cached_property
    def _shows_calls(self) -> bool:
        return _WORD in self.renderer.render([_USER, _CALL])

    def _added(self, before: str, after: str) -> str:
        if not after.startswith(before):
            raise UserError(
                f"{self.name}: the chat template writes what was said otherwise once more is said, "
                "so that no token sequence extends; set tokenizer.template=chatml."
            )
        return after[len(before) :]
