"""From recorded messages to the windows that they are trained in."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.splitting.recorded import (
    DEFAULT_OPTIONS,
    SplitOptions,
    SplitRecording,
    split_recorded,
)
from klong_jax.text.dialect import Dialect, cut_marker


def split_messages(
    chat: Dialect,
    messages: Sequence[Message],
    pinned_messages: int,
    policy: ContextPolicy,
    where: str,
    options: SplitOptions = DEFAULT_OPTIONS,
    untrained: Collection[int] = (),
) -> SplitRecording:
    """Splits one recorded conversation as the agent would have seen it.

    Args:
        chat: The dialect.
        messages: The conversation.
        pinned_messages: How many messages at the front every window keeps.
        policy: The context policy.
        where: Names the recording in errors.
        options: What the policy leaves open.
        untrained: Messages that are shown but not trained.

    Raises:
        UserError: The pinned prefix or a turn does not fit; names `where`.
    """
    try:
        turns, prefix_len = chat.turns(messages, pinned_messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    turns = tuple(
        replace(turn, trained=False) if answer in untrained else turn
        for answer, turn in zip(answers, turns, strict=True)
    )
    policy = replace(policy, marker=cut_marker(chat))
    return split_recorded(turns, prefix_len, policy, options, where)
