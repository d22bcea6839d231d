"""The loss on recordings that are not trained on, and where in a trajectory it arises.

A policy that only learnt how trajectories begin has a loss that grows along them. So the windows of
the second half of each trajectory are told apart, and the tokens by how far into their trajectory
they stand, in bins that double: each trained token counts once, in the window that trains it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from klong_jax.core.trajectory import Window
from klong_jax.models.decoder import Decoder, Params
from klong_jax.sft.data import WindowDataset
from klong_jax.sft.loss import token_losses
from klong_jax.training.batches import (
    Group,
    WindowBatch,
    micro_batches,
    packed_spots,
    place_batch,
)

_LOSS_FROM, _TOKENS_FROM = "heldout_loss_from_", "heldout_tokens_from_"
_BINS = 64  # as many as a position has bits

_TOGETHER = 64
"""Windows that are judged together, at least: enough to fill rows, few enough to hold."""


class HeldOut:
    """Recordings to be judged by."""

    def __init__(self, data: WindowDataset, graph: nnx.GraphDef[Decoder], rows: int) -> None:
        """Prepares the program.

        Args:
            data: The recordings; each group is a whole trajectory.
            graph: The decoder.
            rows: Rows a call.
        """
        loss = token_losses(graph)

        @jax.jit
        def each(params: Params, batch: WindowBatch) -> Float[Array, "b t"]:
            return loss(params, batch)[1]["token_losses"]

        self._data, self._layout, self._each = data, data.layout(rows), each

    def losses(self, params: Params) -> dict[str, float]:
        """Nats a trained token, of all and of some.

        Returns:
            `heldout_loss`; `heldout_late_loss` of the later half of each trajectory's windows,
            missing where no trajectory is longer than a window; and for each power of two N that
            any token stands behind, `heldout_loss_from_N` of those at positions from N to 2 N - 1
            of their trajectory's stream, and `heldout_tokens_from_N`, how many they are.
        """
        every, late = np.zeros((_BINS, 2)), np.zeros(2)
        for groups in self._chunks():
            windows = [window for group in groups for window in group]
            second = (2 * number >= len(group) for group in groups for number in range(len(group)))
            judged = self._judged(params, windows)
            for window, losses, later in zip(windows, judged, second, strict=True):
                # Nothing predicts a first token.
                place = np.flatnonzero(window.trained_mask[1:]) + 1
                position = place + (window.end - len(window.tokens))
                bins = np.frexp(position)[1] - 1
                sums = np.zeros((_BINS, 2))
                np.add.at(sums, bins, np.stack([losses[place - 1], np.ones(len(place))], axis=1))
                every += sums
                if later:
                    late += sums.sum(axis=0)
        total, count = every.sum(axis=0)
        told = {"heldout_loss": float(total / count)}
        if late[1]:
            told["heldout_late_loss"] = float(late[0] / late[1])
        for power in np.flatnonzero(every[:, 1]).tolist():
            total, count = every[power]
            told[f"{_LOSS_FROM}{2**power}"] = float(total / count)
            told[f"{_TOKENS_FROM}{2**power}"] = int(count)
        return told

    def _judged(self, params: Params, windows: Sequence[Window]) -> Iterator[np.ndarray]:
        """Of each window float64[t]: what its tokens lose, at the places before their own."""
        layout = self._layout
        whole = layout.arrange(windows, [1.0] * len(windows))
        batches = map(place_batch, micro_batches(whole, layout.rows))
        rows = np.concatenate([np.asarray(self._each(params, batch)) for batch in batches])
        if not layout.pack:
            return (row.astype(float) for row in rows[: len(windows)])
        spots = packed_spots(windows, layout.length)
        return (rows[spot.row, spot.start : spot.stop].astype(float) for spot in spots)

    def _chunks(self) -> Iterator[list[Group]]:
        """Groups that are taken together."""
        chunk: list[Group] = []
        for group in self._data.groups:
            chunk.append(group)
            if sum(map(len, chunk)) >= _TOGETHER:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def losses_by_position(row: Mapping[str, Any]) -> tuple[tuple[int, float, int], ...]:
    """What `HeldOut.losses` told, back from a row of metrics.

    Returns:
        For each N in order: it, nats a token of those at positions N to 2 N - 1, and how many.
    """
    starts = sorted(int(name[len(_LOSS_FROM) :]) for name in row if name.startswith(_LOSS_FROM))
    return tuple(
        (start, row[f"{_LOSS_FROM}{start}"], row[f"{_TOKENS_FROM}{start}"]) for start in starts
    )
