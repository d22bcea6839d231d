"""What a chat model is to the agent: a context in, one assistant turn out."""

from dataclasses import dataclass
from typing import Protocol

from klong_jax.core.message import Message


class ContextLengthExceeded(Exception):
    """The model refused the context as too long; the agent answers by opening a new window."""


class ModelUnavailable(Exception):
    """The model could not be reached or gave up; an infrastructure failure, not the agent's."""


@dataclass(frozen=True)
class Prompt:
    """The context of one turn, as text and as tokens.

    Attributes:
        session: Names the rollout, so that a model can keep its pinned prefix cached.
        messages: The window as chat messages.
        token_ids: The same window as tokens, the generation prompt included.
        prefix_len: How many of the tokens are pinned.
    """

    session: str
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    prefix_len: int


@dataclass(frozen=True)
class Completion:
    """One assistant turn.

    Attributes:
        message: The turn as text.
        output_ids: The tokens sampled, the end-of-turn token included where it was reached.
        logprobs: One a token; empty where the model does not tell.
        finish_reason: "stop", or "length" when it was cut by the token or time allowance.
        version: Version of the policy that sampled.
        gen_s: Measured seconds of generation, waiting excluded.
        wait_s: Measured seconds of waiting for a place.
        problem: What was malformed in the turn, one sentence for the model; empty when fine.
    """

    message: Message
    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    finish_reason: str = "stop"
    version: int = 0
    gen_s: float = 0.0
    wait_s: float = 0.0
    problem: str = ""


class ChatModel(Protocol):
    """A model that can take an agent's turn."""

    async def complete(
        self, prompt: Prompt, *, max_tokens: int, deadline_s: float | None
    ) -> Completion:
        """Samples one assistant turn.

        Args:
            prompt: The context.
            max_tokens: Longest output.
            deadline_s: Seconds of generation after which to cut, or None.

        Raises:
            ContextLengthExceeded: The context is too long for the model.
            ModelUnavailable: No answer could be had.
        """
        ...

    async def forget(self, session: str) -> None:
        """Frees what is kept for a session; unknown sessions are fine."""
        ...
