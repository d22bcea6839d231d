"""Datasets of windows, read in a shuffled order that follows from seed and position alone."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message
from klong_jax.core.trajectory import Window
from klong_jax.sft.recorded import split_messages
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.dialect import Dialect
from klong_jax.training.batches import Group, Layout


@dataclass(frozen=True)
class WindowDataset:
    """Groups of windows that are trained together.

    Attributes:
        name: For logs.
        groups: All of them.
        length: Tokens a window is padded to.
        shared: Tokens at the front of a group's windows that are computed once; 0 for none.
        prefix_trained: Whether any of these tokens is trained.
    """

    name: str
    groups: Sequence[Group]
    length: int
    shared: int = 0
    prefix_trained: bool = True

    def __post_init__(self) -> None:
        if not self.groups:
            raise UserError(f"sft: the dataset {self.name!r} holds no windows; check its source.")

    def layout(self, rows: int) -> Layout:
        """How its batches are laid out: the same shapes for all of them."""
        return Layout(self.length, rows, self.shared, self.prefix_trained)

    def batch(self, position: int, size: int, seed: int) -> list[Group]:
        """The groups from `position` on, each epoch in an order of its own.

        Nothing is kept between calls: the position is all a checkpoint has to remember.
        """
        count = len(self.groups)
        chosen = []
        for place in range(position, position + size):
            epoch, index = divmod(place, count)
            chosen.append(self.groups[_order(count, seed, epoch)[index]])
        return chosen


@lru_cache(4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    return order


def grouped(windows: Sequence[Window], most: int) -> Iterator[Group]:
    """Cuts the windows of one trajectory into groups of up to `most` neighbours."""
    for start in range(0, len(windows), most):
        yield tuple(windows[start : start + most])


def best_shared(prefixes: Iterable[tuple[int, int]], multiple: int) -> int:
    """The length of the shared prefix that spares the most tokens; 0 if none does.

    A group shares it if its pinned prefix is as long, and then computes it once instead of once a
    window.

    Args:
        prefixes: Of each group the length of its pinned prefix and its number of windows.
        multiple: What the length is a multiple of.
    """
    spared: Counter[int] = Counter()
    for prefix_len, windows in prefixes:
        spared[prefix_len // multiple * multiple] += windows - 1
    best = most = windows = 0
    for length in sorted(spared, reverse=True):
        windows += spared[length]
        if windows * length > most:
            best, most = length, windows * length
    return best


def windows_of(
    chat: Dialect,
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
