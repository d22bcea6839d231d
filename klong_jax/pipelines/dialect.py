"""The chat dialect that the settings ask for, and what there is to say about its use."""

from collections.abc import Sequence
from pathlib import Path

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message
from klong_jax.core.trajectory import Turn
from klong_jax.pipelines.config.training import TokenizerSection
from klong_jax.text.chat import Chat
from klong_jax.text.dialect import Dialect
from klong_jax.text.template import load_template
from klong_jax.text.template_chat import TemplateChat
from klong_jax.text.tokenizer import Tokenizer


def make_dialect(
    section: TokenizerSection, tokenizer: Tokenizer, folder: Path | None = None
) -> Dialect:
    """The dialect over a tokenizer.

    Args:
        section: Says which.
        tokenizer: The tokenizer, wherever it came from.
        folder: Where the model's chat template is; if not given, where the tokenizer came from.

    Raises:
        UserError: The model's own template is asked for and there is none.
    """
    if section.template == "chatml":
        return Chat(tokenizer)
    folder = folder or section.path
    if folder is None:
        raise UserError(
            "tokenizer.template=own: nothing that is used here has a chat template of its own; "
            "set tokenizer.path to a model's folder or tokenizer.template=chatml."
        )
    template = load_template(folder if folder.is_dir() else folder.parent)
    return TemplateChat(tokenizer, template, section.thinking)


def remarks(
    dialect: Dialect, messages: Sequence[Message], turns: Sequence[Turn]
) -> tuple[str, ...]:
    """Sentences on where the dialect does not show a recording as it is."""
    found: dict[str, list[int]] = {}
    for number, turn in enumerate(turns):
        if turn.restart:
            found.setdefault(f"a new window begins, since {turn.restart}", []).append(number)
    if isinstance(dialect, TemplateChat) and (left_out := dialect.left_out(messages)):
        found["the template leaves out some of what the assistant says"] = list(left_out)
    return tuple(
        f"turn{'s' if numbers[1:] else ''} {_runs(numbers)}: {what}"
        for what, numbers in found.items()
    )


def _runs(numbers: Sequence[int]) -> str:
    """Ascending numbers, those in a row as their first and last."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
