"""What a chat dialect gives to the agent, the splitter, SFT and distillation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from klong_jax.core.message import Message
from klong_jax.core.trajectory import Turn
from klong_jax.text.tokenizer import Tokenizer

CUT_MARK = "\n[... cut to fit the context ...]\n"
"""Stands where the middle of an environment text was left out."""


@dataclass(frozen=True)
class ParsedOutput:
    """What an assistant's text says.

    Attributes:
        message: The message; malformed calls are left out of it.
        problem: One sentence on what was malformed, meant for the model; empty when fine.
    """

    message: Message
    problem: str


class Dialect(Protocol):
    """A conversation as tokens that are only ever appended.

    Every piece is encoded by itself, and what was sampled is never rendered again, so the policy
    trains on exactly the tokens it produced.
    """

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the pieces."""
        ...

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The generation prompt that opens an assistant turn."""
        ...

    @property
    def end_id(self) -> int:
        """The token that ends a turn."""
        ...

    @property
    def cut_ids(self) -> tuple[int, ...]:
        """Closes a turn that was cut before its end-of-turn token."""
        ...

    def environment_ids(self, messages: Sequence[Message], *, after_output: bool) -> list[int]:
        """Tokens of closed environment messages, the generation prompt not included.

        Args:
            messages: System, user and tool messages in order.
            after_output: Whether an assistant turn comes right before.
        """
        ...

    def output_ids(self, message: Message) -> list[int]:
        """Tokens an assistant would have sampled to say `message`, the end of the turn included."""
        ...

    def parse(self, ids: Iterable[int]) -> ParsedOutput:
        """Reads sampled tokens as an assistant message."""
        ...

    def turns(
        self, messages: Sequence[Message], pinned_messages: int
    ) -> tuple[tuple[Turn, ...], int]:
        """A recorded conversation as turns.

        Args:
            messages: The whole conversation; what follows the last assistant message is dropped.
            pinned_messages: How many messages at the front every window keeps.

        Returns:
            The turns, and the length of the pinned prefix in tokens.
        """
        ...


def cut_marker(dialect: Dialect) -> tuple[int, ...]:
    """The tokens that stand where the middle of an environment text was left out."""
    return tuple(dialect.tokenizer.encode(CUT_MARK, specials=False))
