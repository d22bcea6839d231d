"""The held-out loss is that of training, token by token, and tells late windows apart."""

import jax
import numpy as np
import pytest
from flax import nnx

from klong_jax.core.trajectory import Window
from klong_jax.models.config import DecoderConfig
from klong_jax.models.decoder import build
from klong_jax.sft.data import WindowDataset
from klong_jax.sft.heldout import HeldOut
from klong_jax.sft.loss import sft_loss

GRAPH, PARAMS = build(DecoderConfig(30, 16, 2, 2, 1, 8, 32), 0)
LENGTH = 12


def window(index: int, length: int, seed: int) -> Window:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 30, length, np.int32)
    trained = rng.random(length) < 0.6
    return Window(index, 2, tokens, trained, np.zeros(length, np.float32), tokens)


def by_hand(windows: list[Window]) -> float:
    decoder = nnx.merge(GRAPH, PARAMS)
    total, count = 0.0, 0
    for one in windows:
        logits = decoder.apply(one.tokens[None])[0] @ decoder.output_embedding.T
        logprobs = jax.nn.log_softmax(logits)
        for place in np.flatnonzero(one.trained_mask[1:]) + 1:
            total -= float(logprobs[place - 1, one.tokens[place]])
            count += 1
    return total / count


def test_the_loss_is_the_mean_over_trained_tokens_and_late_windows_are_told_apart() -> None:
    groups = (
        tuple(window(index, 12 - index, index) for index in range(5)),
        (window(0, 7, 9),),
    )
    every = [one for group in groups for one in group]
    by_token = {
        "heldout_loss": pytest.approx(by_hand(every), rel=1e-5),
        "heldout_late_loss": pytest.approx(by_hand(list(groups[0][3:])), rel=1e-5),
    }
    for pack in (False, True):
        data = WindowDataset("x", groups, LENGTH, pack=pack)
        assert HeldOut(data, sft_loss(GRAPH, remat="none"), 4).losses(PARAMS) == by_token


def test_trajectories_of_one_window_have_no_late_ones() -> None:
    data = WindowDataset("x", ((window(0, 7, 9),),), LENGTH)
    losses = HeldOut(data, sft_loss(GRAPH, remat="none"), 2).losses(PARAMS)
    assert losses.keys() == {"heldout_loss"}
