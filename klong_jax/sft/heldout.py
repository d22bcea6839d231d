"""The loss on recordings that are not trained on, and on the later part of long ones.

A policy that only learnt how trajectories begin has a loss that grows along them; so the windows of
the second half of each trajectory are also told apart.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from klong_jax.core.trajectory import Window
from klong_jax.models.decoder import Params
from klong_jax.sft.data import WindowDataset
from klong_jax.training.batches import WindowBatch, micro_batches, pad_windows, place_batch
from klong_jax.training.loss import WindowLoss


class HeldOut:
    """Recordings to be judged by."""

    def __init__(self, data: WindowDataset, loss: WindowLoss, rows: int) -> None:
        """Prepares the program.

        Args:
            data: The recordings; each group is a whole trajectory.
            loss: The loss, summed over trained tokens.
            rows: Windows a call.
        """

        @jax.jit
        def summed(params: Params, batch: WindowBatch) -> Float[Array, ""]:
            return loss(params, batch)[0]

        self._data, self._rows, self._summed = data, rows, summed

    def losses(self, params: Params) -> dict[str, float]:
        """Nats a trained token: `heldout_loss`, and `heldout_late_loss` of later windows.

        The second is missing where no trajectory is longer than a window.
        """
        early, late = np.zeros(2), np.zeros(2)
        for group in self._data.groups:
            half = -(-len(group) // 2)
            early += self._sums(params, group[:half])
            late += self._sums(params, group[half:])
        total, count = early + late
        losses = {"heldout_loss": float(total / count)}
        if late[1]:
            losses["heldout_late_loss"] = float(late[0] / late[1])
        return losses

    def _sums(self, params: Params, windows: Sequence[Window]) -> tuple[float, float]:
        """The summed loss of windows, and how many tokens it is of."""
        if not windows:
            return 0.0, 0.0
        padded = pad_windows(windows, [1.0] * len(windows), self._data.length)
        batches: Any = map(place_batch, micro_batches(padded, self._rows))
        total = sum(float(self._summed(params, batch)) for batch in batches)
        # Nothing predicts a first token.
        return total, float(padded.trained[:, 1:].sum())
