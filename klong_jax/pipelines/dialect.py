"""The chat dialect that the settings ask for, and what there is to say about its use."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import Json, read_json, write_json
from klong_jax.core.message import Message
from klong_jax.core.trajectory import Turn
from klong_jax.pipelines.config.training import TokenizerSection
from klong_jax.text.chat import Chat
from klong_jax.text.dialect import Dialect
from klong_jax.text.template import ChatTemplate, load_template
from klong_jax.text.template_chat import TemplateChat
from klong_jax.text.tokenizer import Tokenizer

_FILE = "dialect.json"


def make_dialect(
    section: TokenizerSection,
    tokenizer: Tokenizer,
    folder: Path | None = None,
    learnt: Dialect | None = None,
) -> Dialect:
    """The dialect over a tokenizer.

    Args:
        section: Says which.
        tokenizer: The tokenizer, wherever it came from.
        folder: Where the model's chat template is; if not given, where the tokenizer came from.
        learnt: What the policy has been trained in, if it has been trained.

    Raises:
        UserError: The model's own template is asked for and there is none, or the policy has
            learnt another dialect.
    """
    own = learnt if isinstance(learnt, TemplateChat) else None
    if section.template == "chatml":
        if own:
            raise UserError(
                f"tokenizer.template=chatml: the policy has learnt that of {own.name}; "
                "set tokenizer.template=own."
            )
        return Chat(tokenizer)
    if own:
        return TemplateChat(tokenizer, own.renderer.template, section.thinking)
    folder = folder or section.path
    if folder is None:
        raise UserError(
            "tokenizer.template=own: nothing that is used here has a chat template of its own; "
            "set tokenizer.path to a model's folder or tokenizer.template=chatml."
        )
    template = load_template(folder if folder.is_dir() else folder.parent)
    return TemplateChat(tokenizer, template, section.thinking)


def save_dialect(folder: Path, dialect: Dialect) -> None:
    """Writes what `load_dialect` reads into a policy's folder; ChatML goes without saying."""
    if isinstance(dialect, TemplateChat):
        value = {"thinking": dialect.thinking, **asdict(dialect.renderer.template)}
        write_json(folder / _FILE, value)


def dialect_identity(dialect: Dialect) -> Json:
    """What decides the tokens of a recording, beside the tokenizer."""
    if not isinstance(dialect, TemplateChat):
        return "chatml"
    template = dialect.renderer.template
    return {
        "template": template.source,
        "variables": template.variables,
        "thinking": dialect.thinking,
    }


def load_dialect(folder: Path, tokenizer: Tokenizer) -> Dialect:
    """The dialect that the policy in a folder has learnt."""
    if not (folder / _FILE).exists():
        return Chat(tokenizer)
    value = read_json(folder / _FILE)
    thinking = value.pop("thinking")
    return TemplateChat(tokenizer, ChatTemplate(**value), thinking)


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
