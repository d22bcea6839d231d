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
from klong_jax.training.batches import WindowBatch, micro_batches, pad_windows, place_batch

_LOSS_FROM, _TOKENS_FROM = "heldout_loss_from_", "heldout_tokens_from_"
_BINS = 64  # as many as a position has bits


class HeldOut:
    """Recordings to be judged by."""

    def __init__(self, data: WindowDataset, graph: nnx.GraphDef[Decoder], rows: int) -> None:
        """Prepares the program.

        Args:
            data: The recordings; each group is a whole trajectory.
            graph: The decoder.
            rows: Windows a call.
        """
        loss = token_losses(graph)

        @jax.jit
        def each(params: Params, batch: WindowBatch) -> Float[Array, "b t"]:
            return loss(params, batch)[1]["token_losses"]

        self._data, self._rows, self._each = data, rows, each

    def losses(self, params: Params) -> dict[str, float]:
        """Nats a trained token, of all and of some.

        Returns:
            `heldout_loss`; `heldout_late_loss` of the later half of each trajectory's windows,
            missing where no trajectory is longer than a window; and for each power of two N that
            any token stands behind, `heldout_loss_from_N` of those at positions from N to 2 N - 1
            of their trajectory's stream, and `heldout_tokens_from_N`, how many they are.
        """
        every, late = np.zeros((_BINS, 2)), np.zeros(2)
        for group in self._data.groups:
            half = -(-len(group) // 2)
            for number, (window, losses) in enumerate(self._judged(params, group)):
                # Nothing predicts a first token.
                place = np.flatnonzero(window.trained_mask[1:]) + 1
                position = place + (window.end - len(window.tokens))
                bins = np.frexp(position)[1] - 1
                sums = np.zeros((_BINS, 2))
                np.add.at(sums, bins, np.stack([losses[place - 1], np.ones(len(place))], axis=1))
                every += sums
                if number >= half:
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

    def _judged(
        self, params: Params, windows: Sequence[Window]
    ) -> Iterator[tuple[Window, np.ndarray]]:
        """Each window, and float64[t] of what its tokens lose at the places before their own."""
        padded = pad_windows(windows, [1.0] * len(windows), self._data.length)
        batches: Any = map(place_batch, micro_batches(padded, self._rows))
        rows = (row for batch in batches for row in np.asarray(self._each(params, batch), float))
        return zip(windows, rows, strict=False)  # behind the last come rows of padding


def losses_by_position(row: Mapping[str, Any]) -> tuple[tuple[int, float, int], ...]:
    """What `HeldOut.losses` told, back from a row of metrics.

    Returns:
        For each N in order: it, nats a token of those at positions N to 2 N - 1, and how many.
    """
    starts = sorted(int(name[len(_LOSS_FROM) :]) for name in row if name.startswith(_LOSS_FROM))
    return tuple(
        (start, row[f"{_LOSS_FROM}{start}"], row[f"{_TOKENS_FROM}{start}"]) for start in starts
    )
