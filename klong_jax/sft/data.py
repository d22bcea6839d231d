"""Datasets of windows, read in a shuffled order that follows from seed and position alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message
from klong_jax.core.trajectory import Window
from klong_jax.sft.recorded import split_messages
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.chat import Chat


@dataclass(frozen=True)
class WindowDataset:
    """Windows that are trained together.

    Attributes:
        name: For logs.
        windows: All of them.
        length: Tokens a window is padded to.
    """

    name: str
    windows: tuple[Window, ...]
    length: int

    def __post_init__(self) -> None:
        if not self.windows:
            raise UserError(f"sft: the dataset {self.name!r} holds no windows; check its source.")

    def batch(self, position: int, size: int, seed: int) -> list[Window]:
        """The windows from `position` on, each epoch in an order of its own.

        Nothing is kept between calls: the position is all a checkpoint has to remember.
        """
        count = len(self.windows)
        chosen = []
        for place in range(position, position + size):
            epoch, index = divmod(place, count)
            order = np.random.default_rng([seed, epoch]).permutation(count)
            chosen.append(self.windows[order[index]])
        return chosen


def windows_of(
    chat: Chat,
    messages: Sequence[Message],
    pinned_messages: int,
    policy: ContextPolicy,
    where: str,
) -> tuple[Window, ...]:
    """Splits one recorded conversation into the windows that the agent would have seen.

    Raises:
        UserError: The pinned prefix or a turn does not fit; names `where`.
    """
    return split_messages(chat, messages, pinned_messages, policy, where).windows()
