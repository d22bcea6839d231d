"""A recorded conversation as turns of a template's pieces, and the proof that they are its own.

Invariant: in every turn's context, the environment's words are exactly what the template writes
there when it renders the conversation up to that turn as a whole. The turns said before are there
as they were said, which under the policy `keep` is where the context may differ from that text, and
nowhere else; under `strip` it never does, because a turn for which it would begins a new window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message
from klong_jax.core.trajectory import Turn

if TYPE_CHECKING:
    from klong_jax.text.template_chat import TemplateChat

_DROPPED = "the template drops thinking of earlier turns"
_REWRITTEN = "the template writes earlier messages otherwise"


@dataclass(frozen=True)
class _Step:
    """One assistant turn in marked text.

    Attributes:
        number: Position of the assistant's message.
        news: What the environment said since the last turn.
        context: The text since the last output, or since the beginning where the turn restarts.
        said: The output, its end included where the template writes one.
        restart: Why the context does not extend what was there before; empty where it does.
    """

    number: int
    news: tuple[Message, ...]
    context: str
    said: str
    restart: str = ""


def template_turns(
    chat: "TemplateChat", messages: Sequence[Message], pinned_messages: int
) -> tuple[tuple[Turn, ...], int]:
    """Turns and the pinned prefix's length in tokens; see `TemplateChat.turns`."""
    chat.terminator("user")  # refuses a template whose turns have no end
    steps = _pieces(chat, messages)
    if not steps:
        pinned = chat.environment_ids(messages[:pinned_messages], after_output=False)
        return (), len(pinned)
    if chat.thinking == "keep":
        _verify(chat, messages, steps)
    else:
        steps = _replay(chat, messages, steps)
    return _turns(chat, messages, steps, pinned_messages)


def _pieces(chat: "TemplateChat", messages: Sequence[Message]) -> list[_Step]:
    steps: list[_Step] = []
    news: list[Message] = []
    for number, message in enumerate(messages):
        if message.role != "assistant":
            news.append(message)
            continue
        try:
            context = chat.environment(news, after_output=bool(steps)) + chat.prompt
            steps.append(_Step(number, tuple(news), context, chat.said(message)))
        except UserError as error:
            raise UserError(f"turn {len(steps)}: {error}") from None
        news = []
    return steps


def _verify(chat: "TemplateChat", messages: Sequence[Message], steps: list[_Step]) -> None:
    """Compares the pieces with the template's own text of the whole conversation.

    Raises:
        UserError: They differ in more than the thinking of earlier turns; names the turn.
    """
    whole = chat.renderer.render(messages[: steps[-1].number + 1])
    wrong, at = _follow(chat, messages, steps, whole)
    if wrong is None and whole[at:].rstrip() != steps[-1].said.rstrip():
        wrong = len(steps) - 1
    if wrong is not None:
        raise UserError(
            f"turn {wrong}: {chat.name} breaks the extension of tokens here, since {_REWRITTEN} as "
            "the conversation goes on; set tokenizer.thinking=strip or tokenizer.template=chatml."
        )


def _replay(chat: "TemplateChat", messages: Sequence[Message], steps: list[_Step]) -> list[_Step]:
    """The steps in the template's own text at every turn, with a restart where that breaks."""
    replayed: list[_Step] = []
    shown = ""
    for turn, step in enumerate(steps):
        context = chat.renderer.render(messages[: step.number], prompt=True)
        restart = ""
        if not context.startswith(shown):
            wrong, _ = _follow(chat, messages, steps[: turn + 1], context)
            restart = _DROPPED if wrong is None else _REWRITTEN
        after = chat.renderer.render(messages[: step.number + 1])
        said = step.said
        if after.startswith(context):
            said = after[len(context) :]
            said = said.rstrip() if chat.end else said
        new = context if restart else context[len(shown) :]
        replayed.append(_Step(step.number, step.news, new, said, restart))
        shown = context + said
    return replayed


def _follow(
    chat: "TemplateChat", messages: Sequence[Message], steps: list[_Step], text: str
) -> tuple[int | None, int]:
    """Finds the steps in a rendered text, their outputs in whatever form the template gives them.

    Returns:
        The first turn whose context is not there, or None; and where the last context ends.
    """
    at = 0
    for turn, step in enumerate(steps):
        if not text.startswith(step.context, at):
            return turn, at
        at += len(step.context)
        if turn + 1 == len(steps):
            break
        following = steps[turn + 1].context
        forms = chat.forms(messages[step.number])
        form = next((form for form in forms if text.startswith(form + following, at)), None)
        if form is None:
            return turn + 1, at
        at += len(form)
    return None, at


def _turns(
    chat: "TemplateChat", messages: Sequence[Message], steps: list[_Step], pinned_messages: int
) -> tuple[tuple[Turn, ...], int]:
    turns: list[Turn] = []
    stream: list[int] = []
    prefix_len: int | None = None if pinned_messages else 0
    ended = ""
    for turn, step in enumerate(steps):
        suffix = _suffix(chat, step.context if step.restart else step.context.removeprefix(ended))
        if step.restart:
            if prefix_len is None or suffix[:prefix_len] != stream[:prefix_len]:
                raise UserError(
                    f"turn {turn}: {chat.name} rewrites the pinned messages here "
                    f"({step.restart}); set tokenizer.thinking=keep."
                )
            suffix = suffix[prefix_len:]
        if prefix_len is None and step.number >= pinned_messages:
            prefix_len = len(stream) + _pinned(chat, steps, turn, pinned_messages, suffix)
        ended = _terminator(chat, messages, steps, turn)
        output = chat.renderer.encode(step.said + ended)
        turns.append(Turn(tuple(suffix), tuple(output), restart=step.restart))
        stream += [*suffix, *output]
        if step.number + 1 == pinned_messages:
            prefix_len = len(stream)
    if prefix_len is None:  # what is pinned goes on behind the last answer
        behind = messages[steps[-1].number + 1 : pinned_messages]
        prefix_len = len(stream) + len(chat.environment_ids(behind, after_output=True))
    return tuple(turns), prefix_len


def _suffix(chat: "TemplateChat", context: str) -> list[int]:
    # The prompt is a piece of its own, as it is for the agent.
    return [*chat.renderer.encode(context.removesuffix(chat.prompt)), *chat.prompt_ids]


def _terminator(
    chat: "TemplateChat", messages: Sequence[Message], steps: list[_Step], turn: int
) -> str:
    """The token that ends a turn which the template does not close itself."""
    if turn + 1 == len(steps):
        return chat.terminator("tool" if messages[steps[turn].number].tool_calls else "user")
    news = steps[turn + 1].news
    return chat.terminator(news[0].role) if news else ""


def _pinned(
    chat: "TemplateChat", steps: list[_Step], turn: int, pinned_messages: int, suffix: list[int]
) -> int:
    """How many of a suffix's tokens the pinned messages at its front account for."""
    step = steps[turn]
    front = step.news[: len(step.news) - (step.number - pinned_messages)]
    ids = chat.environment_ids(front, after_output=turn > 0)
    # A message may read otherwise where it is the last, such as one of many tool results.
    same = (a == b for a, b in zip(ids, suffix, strict=False))
    return next(
        (number for number, equal in enumerate(same) if not equal), min(len(ids), len(suffix))
    )
