"""The loss on recordings that are not trained on, and on the later part of long ones.

A policy that only learnt how trajectories begin has a loss that grows along them; so the windows of
the second half of each trajectory are also told apart.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from klong_jax.core.trajectory import Window
from klong_jax.models.decoder import Params
from klong_jax.sft.data import WindowDataset
from klong_jax.training.batches import Group, WindowBatch, lay_out, place_batch
from klong_jax.training.loss import WindowLoss

_TOGETHER = 64
"""Windows that are packed together, at least: enough to fill rows, few enough to hold."""


class HeldOut:
    """Recordings to be judged by."""

    def __init__(self, data: WindowDataset, loss: WindowLoss, rows: int) -> None:
        """Prepares the program.

        Args:
            data: The recordings; each group is a whole trajectory.
            loss: The loss, summed over trained tokens.
            rows: Rows a call.
        """

        @jax.jit
        def summed(params: Params, batch: WindowBatch) -> Float[Array, ""]:
            return loss(params, batch)[0]

        self._data, self._layout, self._summed = data, data.layout(rows), summed

    def losses(self, params: Params) -> dict[str, float]:
        """Nats a trained token: `heldout_loss`, and `heldout_late_loss` of later windows.

        The second is missing where no trajectory is longer than a window.
        """
        early, late = np.zeros(2), np.zeros(2)
        for groups in self._chunks():
            halves = [-(-len(group) // 2) for group in groups]
            pairs = list(zip(groups, halves, strict=True))
            early += self._sums(params, [w for group, half in pairs for w in group[:half]])
            late += self._sums(params, [w for group, half in pairs for w in group[half:]])
        total, count = early + late
        losses = {"heldout_loss": float(total / count)}
        if late[1]:
            losses["heldout_late_loss"] = float(late[0] / late[1])
        return losses

    def _sums(self, params: Params, windows: Sequence[Window]) -> tuple[float, float]:
        """The summed loss of windows, and how many tokens it is of."""
        if not windows:
            return 0.0, 0.0
        batches = map(place_batch, lay_out([tuple(windows)], [1.0], self._layout))
        total = sum(float(self._summed(params, batch)) for batch in batches)
        # Nothing predicts a first token.
        return total, float(sum(int(window.trained_mask[1:].sum()) for window in windows))

    def _chunks(self) -> Iterator[list[Group]]:
        """Groups that are taken together; one by one if their windows share no rows."""
        chunk: list[Group] = []
        for group in self._data.groups:
            chunk.append(group)
            if not self._layout.pack or sum(map(len, chunk)) >= _TOGETHER:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
