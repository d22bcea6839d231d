"""A training step gives the same whatever the micro-batches, the padding and the splitting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klong_jax.core.trajectory import Turn, cut_window, token_stream
from klong_jax.models.config import DecoderConfig
from klong_jax.models.decoder import build
from klong_jax.sft.loss import sft_loss
from klong_jax.training.accumulate import Trainer, init_state
from klong_jax.training.batches import micro_batches, pad_windows
from klong_jax.training.frozen import EVERYTHING, Selection, joined
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer

MODEL = DecoderConfig(50, 16, 2, 2, 1, 8, 32)
GRAPH, PARAMS = build(MODEL, 0)


def windows(count: int) -> list:
    from klong_jax.splitting.policy import ContextPolicy, split

    rng = np.random.default_rng(0)
    turns = tuple(
        Turn(tuple(rng.integers(0, 50, 5).tolist()), tuple(rng.integers(0, 50, 4).tolist()))
        for _ in range(count)
    )
    stream = token_stream(turns)
    spans = split(turns, 9, ContextPolicy(40, 9, 4))
    return [cut_window(i, span, *stream) for i, span in enumerate(spans)]


def step(rows: int, length: int) -> tuple[dict[str, float], object]:
    optimizer = make_optimizer(OptimizerConfig("adamw", 1e-2))
    cut = windows(20)
    trained = sum(int(window.trained_mask.sum()) for window in cut)
    state, logs = Trainer(sft_loss(GRAPH, remat="full" if rows == 2 else "none"), optimizer).step(
        init_state(jax.tree.map(jnp.copy, PARAMS), optimizer),
        micro_batches(pad_windows(cut, [1.0] * len(cut), length), rows),
        trained,
    )
    return logs, state.params


def test_micro_batches_padding_and_remat_change_nothing() -> None:
    logs, params = step(100, 40)
    for rows, length in ((1, 40), (2, 40), (3, 64)):
        other_logs, other = step(rows, length)
        assert other_logs["loss"] == pytest.approx(logs["loss"], rel=1e-5)
        assert other_logs["grad_norm"] == pytest.approx(logs["grad_norm"], rel=1e-4)
        for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(one, two, atol=2e-4)


def test_the_loss_is_the_mean_over_trained_tokens() -> None:
    logs, _ = step(4, 40)
    # A fresh model predicts nearly uniformly: the loss is close to log of the vocabulary.
    assert logs["loss"] == pytest.approx(np.log(50), rel=0.05)
    assert logs["entropy"] == pytest.approx(np.log(50), rel=0.05)


@pytest.mark.parametrize("total", [0, 10])
def test_the_first_step_trains_too(total: int) -> None:
    optimizer = make_optimizer(OptimizerConfig("adamw", 1e-2, warmup_steps=4, total_steps=total))
    trainer = Trainer(sft_loss(GRAPH, remat="none"), optimizer)
    cut = windows(3)
    batches = list(micro_batches(pad_windows(cut, [1.0] * len(cut), 40), 2))
    state = init_state(jax.tree.map(jnp.copy, PARAMS), optimizer)
    losses = []
    for _ in range(2):
        state, logs = trainer.step(state, batches, 1)
        losses.append(logs["loss"])
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("kind", "rate"), [("adamw", 1e-2), ("muon", 1e-1)])
def test_training_lowers_the_loss(kind: str, rate: float) -> None:
    optimizer = make_optimizer(OptimizerConfig(kind, rate, warmup_steps=2, total_steps=30))
    trainer = Trainer(sft_loss(GRAPH, remat="none"), optimizer)
    state = init_state(jax.tree.map(jnp.copy, PARAMS), optimizer)
    cut = windows(8)
    trained = sum(int(window.trained_mask.sum()) for window in cut)
    losses = []
    for _ in range(30):
        batches = micro_batches(pad_windows(cut, [1.0] * len(cut), 40), 2)
        state, logs = trainer.step(state, batches, trained)
        losses.append(logs["loss"])
    assert losses[-1] < 0.6 * losses[0]
    assert int(state.step) == 30


def test_what_is_frozen_is_neither_computed_nor_copied() -> None:
    cut = windows(4)
    (batch,) = micro_batches(pad_windows(cut, [1.0] * len(cut), 40), 100)
    flops = []
    for selection in (EVERYTHING, Selection(("blocks.*", "embedding"))):
        optimizer = make_optimizer(OptimizerConfig())
        trainer = Trainer(sft_loss(GRAPH, remat="none"), optimizer, selection=selection)
        parts = selection.split(PARAMS)
        lowered = trainer.accumulate.lower(*parts, trainer.start(*parts, batch), batch)
        flops.append(lowered.compile().cost_analysis()["flops"])
    assert flops[1] < 0.75 * flops[0], "matrices have no gradient of their own"
    params = joined(jax.tree.map(jnp.copy, parts[0]), parts[1])
    before = jax.tree.map(np.asarray, parts[1])
    state, logs = trainer.step(init_state(params, optimizer, selection), [batch], 1)
    learnt, frozen = selection.split(state.params)
    assert frozen["embedding"][...] is parts[1]["embedding"][...]
    for now, then in zip(jax.tree.leaves(frozen), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(now, then)
    assert (learnt["norm"]["scale"][...] != PARAMS["norm"]["scale"][...]).all()
    assert logs["grad_norm"] > 0


def test_a_step_without_batches_is_refused() -> None:
    optimizer = make_optimizer(OptimizerConfig())
    with pytest.raises(ValueError, match="micro-batch"):
        Trainer(sft_loss(GRAPH, remat="none"), optimizer).step(init_state(PARAMS, optimizer), [], 1)
