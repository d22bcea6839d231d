"""Datasets of windows, read in a shuffled order that follows from seed and position alone."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message
from klong_jax.core.trajectory import Window
from klong_jax.sft.mixture import Mixture
from klong_jax.sft.recorded import split_messages
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.dialect import Dialect
from klong_jax.training.batches import Group, Layout

_MOST_SHARED = 3
_WORTH = 0.03
"""What another length must spare of the tokens that are computed."""


@dataclass(frozen=True)
class WindowDataset:
    """Groups of windows that are trained together.

    Attributes:
        name: For logs.
        groups: All of them.
        length: Tokens a window is padded to.
        shared: Tokens at the front of a group's windows that are computed once, each group's the
            longest that its pinned prefix has; shortest first.
        prefix_trained: Whether any of these tokens is trained.
        whole: Whether the pinned prefix of any group has none.
        pack: Whether short windows share a row.
        mixture: In which order groups of several sources are drawn, whose groups stand end to end;
            of one source, each epoch has an order of its own.
    """

    name: str
    groups: Sequence[Group]
    length: int
    shared: tuple[int, ...] = ()
    prefix_trained: bool = True
    whole: bool = True
    pack: bool = False
    mixture: Mixture | None = None

    def __post_init__(self) -> None:
        if not self.groups:
            raise UserError(f"sft: the dataset {self.name!r} holds no windows; check its source.")

    def layout(self, rows: int) -> Layout:
        """How its batches are laid out: the same shapes for all of them."""
        return Layout(
            self.length,
            rows,
            self.shared,
            self.prefix_trained,
            whole=self.whole,
            pack=self.pack,
        )

    def batch(self, position: int, size: int, seed: int) -> list[Group]:
        """The groups from `position` on.

        Nothing is kept between calls: the position is all a checkpoint has to remember.
        """
        return [self.groups[self._at(place, seed)] for place in range(position, position + size)]

    def _at(self, place: int, seed: int) -> int:
        if self.mixture is not None:
            draw = self.mixture.at(place)
            before = self.mixture.sources[: draw.source]
            return sum(source.size for source in before) + draw.index
        epoch, index = divmod(place, len(self.groups))
        return _order(len(self.groups), seed, epoch)[index]


@lru_cache(4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    return order


class Joined(Sequence[Group]):
    """Sequences of groups end to end."""

    def __init__(self, parts: Sequence[Sequence[Group]]) -> None:
        self._parts = parts
        self._first = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(f"group {number} of {len(self)}")
        part = bisect_right(self._first, number) - 1
        return self._parts[part][number - self._first[part]]


def best_shared(
    prefixes: Iterable[tuple[int, int]], multiple: int, length: int, rows_share: float
) -> tuple[int, ...]:
    """The lengths of shared prefixes that spare the most tokens, the shortest first.

    A group shares the longest that its pinned prefix has, and then computes it once instead of once
    a window. Each length has programs of its own, and groups of two lengths share no micro-batch,
    of which half stays empty on average. So after the first, a length is only added for what it
    spares beyond that, of all that is still computed.

    Args:
        prefixes: Of each group the length of its pinned prefix and its number of windows.
        multiple: What the lengths are a multiple of.
        length: Tokens a window is padded to.
        rows_share: Rows of a micro-batch that may stay empty, as a share of a step's groups.
    """
    repeats: Counter[int] = Counter()
    computed = 0
    for prefix_len, windows in prefixes:
        repeats[prefix_len // multiple * multiple] += windows - 1
        computed += windows * length
    # The longest first, which wins where two spare as much.
    found = np.array(sorted(repeats, reverse=True), np.int64)
    count = np.array([repeats[size] for size in found.tolist()], np.int64)
    worth, shared = _WORTH + rows_share / 2, np.zeros_like(found)
    chosen: list[int] = []
    while len(found) and len(chosen) < _MOST_SHARED:
        candidates = found[:, None]
        more = np.where(found >= candidates, np.maximum(candidates - shared, 0), 0) @ count
        best = int(more.argmax())
        if more[best] == 0 or (chosen and more[best] < worth * computed):
            break
        chosen.append(int(found[best]))
        shared = np.maximum(shared, np.where(found >= found[best], found[best], 0))
        computed -= int(more[best])
    return tuple(sorted(chosen))


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
