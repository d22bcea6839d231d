"""Windows as arrays of one fixed shape."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from klong_jax.core.trajectory import Window
from klong_jax.parallel.rules import array_sharding, rounded_up, spread


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "trained", "behaviour_logprobs", "reference_logprobs", "weight"],
    meta_fields=[],
)
@dataclass(frozen=True)
class WindowBatch:
    """A micro-batch of windows, padded at the end.

    Attributes:
        tokens: int32[b, s] token ids, zero where padded.
        trained: float32[b, s], 1 where the token is trained.
        behaviour_logprobs: float32[b, s] of the policy that sampled.
        reference_logprobs: float32[b, s] of the reference policy; zero where there is none.
        weight: float32[b], the window's weight: 1 in SFT, the advantage in RL.
    """

    tokens: np.ndarray
    trained: np.ndarray
    behaviour_logprobs: np.ndarray
    reference_logprobs: np.ndarray | Array
    weight: np.ndarray


def pad_windows(windows: Sequence[Window], weights: Sequence[float], length: int) -> WindowBatch:
    """Lays windows out as rows of `length` tokens."""
    rows = len(windows)
    batch = WindowBatch(
        tokens=np.zeros((rows, length), np.int32),
        trained=np.zeros((rows, length), np.float32),
        behaviour_logprobs=np.zeros((rows, length), np.float32),
        reference_logprobs=np.zeros((rows, length), np.float32),
        weight=np.asarray(weights, np.float32),
    )
    for row, window in enumerate(windows):
        end = len(window.tokens)
        batch.tokens[row, :end] = window.tokens
        batch.trained[row, :end] = window.trained_mask
        batch.behaviour_logprobs[row, :end] = window.behaviour_logprobs
    return batch


def micro_batches(batch: WindowBatch, rows: int) -> Iterator[WindowBatch]:
    """Cuts a batch into micro-batches of `rows` windows; the last is filled with empty ones.

    On a mesh rows are rounded up to what its devices share evenly.
    """
    total, rows = len(batch.tokens), rounded_up(rows, "batch")
    for start in range(0, total, rows):
        missing = max(0, start + rows - total)
        pieces = {}
        for field in fields(WindowBatch):
            piece = getattr(batch, field.name)[start : start + rows]
            pieces[field.name] = np.pad(piece, ((0, missing), *((0, 0),) * (piece.ndim - 1)))
        yield WindowBatch(**pieces)


def real_tokens(trained: Float[Array, "b s"]) -> Bool[Array, "b s"]:
    """Tokens up to the last that is trained; what follows in its row is padding."""
    return jax.lax.cummax(trained, axis=1, reverse=True) > 0


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
