"""Windows as arrays of one fixed shape."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from klong_jax.core.trajectory import Window
from klong_jax.kernels.limits import MOST_SEGMENTS
from klong_jax.parallel.rules import array_sharding, rounded_up, spread
from klong_jax.splitting.packing import pack

Group = tuple[Window, ...]
"""Windows of one trajectory that are trained together; they begin with the same pinned prefix."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "trained",
        "behaviour_logprobs",
        "reference_logprobs",
        "weight",
        "segments",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class WindowBatch:
    """A micro-batch of windows, padded at the end: arrays of the host, then of the devices.

    Attributes:
        tokens: int32[b, s] token ids, zero where padded.
        trained: float32[b, s], 1 where the token is trained.
        behaviour_logprobs: float32[b, s] of the policy that sampled.
        reference_logprobs: float32[b, s] of the reference policy; zero where there is none.
        weight: float32[b], the window's weight: 1 in SFT, the advantage in RL; float32[b, s], that
            of the token's window, where windows share rows.
        segments: int32[b, s], which of its row's windows a token belongs to: 1, 2, ... in their
            order, and 0 where padded; None where no windows share rows.
    """

    tokens: Any
    trained: Any
    behaviour_logprobs: Any
    reference_logprobs: Any
    weight: Any
    segments: Any = None

    @property
    def token_weight(self) -> Any:
        """The weight that a token has from its window: float32[b, 1] or float32[b, s]."""
        return self.weight[:, None] if self.segments is None else self.weight


def pad_windows(windows: Sequence[Window], weights: Sequence[float], length: int) -> WindowBatch:
    """Lays windows out as rows of `length` tokens."""
    batch = _empty(len(windows), length, np.asarray(weights, np.float32))
    for row, window in enumerate(windows):
        _write(batch, row, 0, window, len(window.tokens))
    return batch


def pack_windows(windows: Sequence[Window], weights: Sequence[float], length: int) -> WindowBatch:
    """Lays windows out one behind another in rows of `length` tokens, each as far as it is trained.

    What stands behind a window's last trained token has no part in its loss or its gradient.
    """
    spots = packed_spots(windows, length)
    rows = 1 + max((spot.row for spot in spots), default=0)
    batch = _empty(rows, length, np.zeros((rows, length), np.float32))
    batch = replace(batch, segments=np.zeros((rows, length), np.int32))
    for window, weight, (row, start, stop, number) in zip(windows, weights, spots, strict=True):
        _write(batch, row, start, window, stop - start)
        batch.weight[row, start:stop] = weight
        batch.segments[row, start:stop] = number
    return batch


class Spot(NamedTuple):
    """Where a window, as far as it is laid out, stands: its row, its columns, its segment there."""

    row: int
    start: int
    stop: int
    segment: int


def packed_spots(windows: Sequence[Window], length: int) -> list[Spot]:
    """Where `pack_windows` puts each window."""
    ends = [_trained_end(window) for window in windows]
    spots = [Spot(0, 0, 0, 0)] * len(windows)
    for row, members in enumerate(pack(ends, length, MOST_SEGMENTS)):
        start = 0
        for segment, member in enumerate(members, 1):
            stop = start + ends[member]
            spots[member] = Spot(row, start, stop, segment)
            start = stop
    return spots


def _empty(rows: int, length: int, weight: np.ndarray) -> WindowBatch:
    return WindowBatch(
        tokens=np.zeros((rows, length), np.int32),
        trained=np.zeros((rows, length), np.float32),
        behaviour_logprobs=np.zeros((rows, length), np.float32),
        reference_logprobs=np.zeros((rows, length), np.float32),
        weight=weight,
    )


def _write(batch: WindowBatch, row: int, start: int, window: Window, count: int) -> None:
    """Puts the first tokens of a window into a row."""
    stop = start + count
    batch.tokens[row, start:stop] = window.tokens[:count]
    batch.trained[row, start:stop] = window.trained_mask[:count]
    batch.behaviour_logprobs[row, start:stop] = window.behaviour_logprobs[:count]


def _trained_end(window: Window) -> int:
    """How many tokens there are up to the last that is trained."""
    return int(np.flatnonzero(window.trained_mask).max(initial=-1)) + 1


def micro_batches(batch: WindowBatch, rows: int) -> Iterator[WindowBatch]:
    """Cuts a batch into micro-batches of `rows` rows; the last is filled with empty ones.

    On a mesh rows are rounded up to what its devices share evenly.
    """
    total, rows = len(batch.tokens), rounded_up(rows, "batch")
    for start in range(0, total, rows):
        yield _stack([_cut(batch, slice(start, start + rows), slice(None))], rows)


@dataclass(frozen=True)
class SharedBatch:
    """A micro-batch of groups of windows, each with a prefix that is computed once.

    Attributes:
        prefix: The groups' prefixes, [b, p] tokens, all of them real.
        trained: Whether a token of a prefix may be trained.
        windows: What follows: the first window of each group, [b, w] tokens, then the second, and
            so on; a group that has no more of them is a row of padding.
    """

    prefix: WindowBatch
    trained: bool
    windows: tuple[WindowBatch, ...]


@dataclass(frozen=True)
class Layout:
    """How groups of windows become micro-batches of few fixed shapes.

    Attributes:
        length: Tokens of a row.
        rows: Rows of windows, or groups that share a prefix, of a micro-batch; on a mesh rounded up
            to what its devices share evenly.
        shared: Tokens at the front of a group's windows that are computed once: of these lengths
            the longest that its pinned prefix has. A group that has none is computed whole.
        trained: Whether a token of a shared prefix may be trained.
        whole: Whether there may be groups that have none.
        pack: Whether short windows share a row; those of a group that shares a prefix never do.
    """

    length: int
    rows: int
    shared: tuple[int, ...] = ()
    trained: bool = True
    whole: bool = True
    pack: bool = False

    def shared_by(self, group: Group) -> int:
        """How many tokens at the front of a group's windows are computed once."""
        return max((n for n in self.shared if n <= group[0].prefix_len), default=0)

    def arrange(self, windows: Sequence[Window], weights: Sequence[float]) -> WindowBatch:
        """Lays out windows that are computed whole."""
        return (pack_windows if self.pack else pad_windows)(windows, weights, self.length)


def lay_out(
    groups: Sequence[Group], weights: Sequence[float], layout: Layout
) -> Iterator[WindowBatch | SharedBatch]:
    """Cuts groups of windows, one weight each, into micro-batches."""
    sharing: dict[int, list[WindowBatch]] = defaultdict(list)
    alone = []
    for group, weight in zip(groups, weights, strict=True):
        if shared := layout.shared_by(group):
            sharing[shared].append(pad_windows(group, [weight] * len(group), layout.length))
        else:
            alone += [(window, weight) for window in group]
    rows = rounded_up(layout.rows, "batch")
    for shared, alike in sorted(sharing.items()):
        # Long groups first: few rows are padding, and those with an n-th window come before others.
        alike.sort(key=lambda group: -len(group.tokens))
        for start in range(0, len(alike), rows):
            yield _shared(alike[start : start + rows], rows, shared, layout.trained)
    if alone:
        whole = layout.arrange([w for w, _ in alone], [weight for _, weight in alone])
        yield from micro_batches(whole, layout.rows)


def _shared(groups: Sequence[WindowBatch], rows: int, shared: int, trained: bool) -> SharedBatch:
    front, rest = slice(0, shared), slice(shared, None)
    # The first window trains the prefix; to the others it is context.
    heads = [_cut(group, slice(0, 1), front) for group in groups]
    tails = [
        [_cut(group, slice(at, at + 1), rest) for group in groups]
        for at in range(len(groups[0].tokens))
    ]
    windows = tuple(_stack(tail, rows) for tail in tails)
    return SharedBatch(_stack(heads, rows), trained, windows)


def _cut(batch: WindowBatch, rows: slice, columns: slice) -> WindowBatch:
    def cut(value: np.ndarray) -> np.ndarray:
        return value[rows] if value.ndim == 1 else value[rows, columns]

    piece: WindowBatch = jax.tree.map(cut, batch)
    return piece


def _stack(parts: Sequence[WindowBatch], rows: int) -> WindowBatch:
    """Rows of several batches in one, and empty ones up to `rows`."""

    def stack(*values: np.ndarray) -> np.ndarray:
        value = np.concatenate(values)
        return np.pad(value, ((0, rows - len(value)), *((0, 0),) * (value.ndim - 1)))

    whole: WindowBatch = jax.tree.map(stack, *parts)
    return whole


def real_tokens(batch: WindowBatch) -> Bool[Array, "b s"]:
    """Tokens of each window up to the last that is trained; what follows is padding."""
    if batch.segments is not None:
        return jnp.asarray(batch.segments) > 0
    return jax.lax.cummax(jnp.asarray(batch.trained), axis=1, reverse=True) > 0


def place_batch(batch: Any) -> Any:
    """Spreads a micro-batch over the active mesh, rows and positions; without one changes nothing.

    Every host holds the same rows, since they follow from seed and step, and sends only those parts
    to its devices that belong there.
    """

    def place(value: Any) -> Any:
        sharding = array_sharding(value.shape, ("batch", "length")[: value.ndim])
        if sharding is None or isinstance(value, jax.Array):
            return value
        return spread(value, sharding)

    return jax.tree.map(place, batch)
