"""Micro-batches hold every window once, in rows that devices share evenly."""

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from klong_jax.core.trajectory import Window
from klong_jax.parallel.mesh import AXES, MeshShape
from klong_jax.training.batches import WindowBatch, micro_batches, pad_windows


def window(size: int) -> Window:
    ones = np.ones(size)
    tokens = np.arange(1, size + 1, dtype=np.int32)
    versions = ones.astype(np.int32)
    return Window(0, 0, tokens, ones.astype(bool), ones.astype(np.float32), versions, size)


def rows(batches: list[WindowBatch]) -> list[int]:
    return [len(batch.tokens) for batch in batches]


def test_the_last_micro_batch_is_filled_with_rows_of_no_weight() -> None:
    whole = pad_windows([window(size) for size in (3, 1, 4, 1, 5)], [1.0] * 5, 6)
    mesh = AbstractMesh(
        MeshShape(fsdp=4, tensor=2).sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )
    alone = list(micro_batches(whole, 2))
    with jax.sharding.use_abstract_mesh(mesh):
        spread = list(micro_batches(whole, 2))
    assert (rows(alone), rows(spread)) == ([2, 2, 2], [4, 4])
    for cut in (alone, spread):
        joined = np.concatenate([batch.trained for batch in cut])
        assert joined[:5].sum() == 14
        assert not joined[5:].any()
        assert not np.concatenate([batch.weight for batch in cut])[5:].any()
