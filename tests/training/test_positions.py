"""Losses by position: the sums of the parts, however tokens are cut into micro-batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.training.positions import loss_by_position, position_row

BOUNDS = (4, 10)


@given(seed=st.integers(0, 2**31), cut=st.integers(0, 3))
def test_parts_are_those_of_a_loop_and_micro_batches_add_up(seed: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    losses = rng.random((3, 6), np.float32)
    weights = (rng.random((3, 6)) < 0.5).astype(np.float32)
    positions = rng.integers(0, 15, (3, 6))
    expected = np.zeros((2, 3))
    for place in np.ndindex(3, 6):
        part = sum(positions[place] >= bound for bound in BOUNDS)
        expected[:, part] += weights[place] * np.asarray([losses[place], 1])
    rows = [slice(0, cut), slice(cut, 3)]
    sums = sum(loss_by_position(losses[r], weights[r], positions[r], BOUNDS) for r in rows)
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)


def test_parts_without_trained_tokens_have_no_mean() -> None:
    sums = loss_by_position(
        np.ones((1, 4)) * 3, np.asarray([[1, 1, 0, 2]]), np.asarray([[0, 3, 5, 10]]), BOUNDS
    )
    assert position_row(sums, BOUNDS) == {
        "loss_from_0": pytest.approx(3),
        "loss_from_10": pytest.approx(3),
    }
