"""Advantages, stages and the loss, each against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.core.trajectory import Turn, cut_window, token_stream
from klong_jax.models.config import DecoderConfig
from klong_jax.models.decoder import build
from klong_jax.rl.advantage import leave_one_out
from klong_jax.rl.loss import RlLossConfig, rl_loss
from klong_jax.rl.stages import Position, Stage, advance, check_stages
from klong_jax.splitting.policy import ContextPolicy, split
from klong_jax.training.batches import pad_windows

SCORES = st.lists(st.none() | st.floats(0, 1), min_size=0, max_size=8)


@given(SCORES)
def test_the_baseline_is_the_mean_of_the_others(scores: list[float | None]) -> None:
    advantages = leave_one_out(scores)
    assert len(advantages) == len(scores)
    valid = [i for i, score in enumerate(scores) if score is not None]
    for index, advantage in enumerate(advantages):
        if index not in valid or len(valid) < 2:
            assert advantage is None
            continue
        others = [scores[i] for i in valid if i != index]
        assert advantage == pytest.approx(scores[index] - np.mean(others), abs=1e-9)
    if len(valid) >= 2:
        assert sum(advantages[i] for i in valid) == pytest.approx(0, abs=1e-9)


STAGES = (Stage(10, 3, advance_score=0.8, min_steps=2), Stage(20, 1))


def test_stages_advance_by_score_or_by_steps() -> None:
    assert advance(STAGES, Position(0, 0), 0.9) == Position(0, 1)  # not before min_steps
    assert advance(STAGES, Position(0, 1), 0.9) == Position(1, 0)
    assert advance(STAGES, Position(0, 1), 0.7) == Position(0, 2)
    assert advance(STAGES, Position(0, 1), None) == Position(0, 2)
    assert advance(STAGES, Position(0, 2), 0.1) == Position(1, 0)
    assert advance(STAGES, Position(1, 0), 0.1) == Position(2, 0)


def test_timeouts_must_grow() -> None:
    with pytest.raises(UserError, match=r"rl.stages\[1\].timeout_s=10"):
        check_stages((Stage(10, 1), Stage(10, 1)))
    with pytest.raises(UserError, match="at least one"):
        check_stages(())


MODEL = DecoderConfig(30, 16, 2, 2, 1, 8, 32)
GRAPH, PARAMS = build(MODEL, 0)


def rollout(seed: int = 0) -> tuple[Turn, ...]:
    rng = np.random.default_rng(seed)
    return tuple(
        Turn(
            tuple(rng.integers(0, 30, 4).tolist()),
            tuple(rng.integers(0, 30, 3).tolist()),
            tuple((-rng.random(3) - 2.5).tolist()),
        )
        for _ in range(10)
    )


def loss_and_grad(limit: int, config: RlLossConfig, advantage: float = 0.5) -> tuple[float, list]:
    turns = rollout()
    stream = token_stream(turns)
    spans = split(turns, 7, ContextPolicy(limit, 1000 if limit > 1000 else 7, 3))
    windows = [cut_window(i, span, *stream) for i, span in enumerate(spans)]
    batch = pad_windows(windows, [advantage] * len(windows), 80)
    (value, _), grads = jax.value_and_grad(rl_loss(GRAPH, config, remat="none"), has_aux=True)(
        PARAMS, batch
    )
    return float(value), jax.tree.leaves(grads)


def test_the_gradient_is_the_importance_weighted_policy_gradient() -> None:
    """Against the definition, token by token, over the unsplit stream."""
    config = RlLossConfig(clip=0.2, importance_cap=1.5)
    tokens, sampled, behaviour, _ = token_stream(rollout())

    def plain(params: object) -> jax.Array:
        decoder = nnx.merge(GRAPH, params)
        logits = decoder.apply(jnp.asarray(tokens[None])) @ decoder.output_embedding.T
        logprobs = jax.nn.log_softmax(logits)[0]
        total = jnp.zeros(())
        for place in np.flatnonzero(sampled):
            logprob = logprobs[place - 1, tokens[place]]
            weight = jnp.minimum(jnp.exp(jax.lax.stop_gradient(logprob) - behaviour[place]), 1.5)
            total -= jax.lax.stop_gradient(weight) * 0.5 * logprob
        return total

    _, grads = loss_and_grad(2000, config)
    for got, want in zip(grads, jax.tree.leaves(jax.grad(plain)(PARAMS)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_kl_is_zero_at_the_reference_and_positive_elsewhere() -> None:
    turns = rollout()
    stream = token_stream(turns)
    span = split(turns, 7, ContextPolicy(2000, 0, 3))[0]
    batch = pad_windows([cut_window(0, span, *stream)], [0.0], 80)
    loss = rl_loss(GRAPH, RlLossConfig(kl_beta=0.1), remat="none")
    decoder = nnx.merge(GRAPH, PARAMS)
    logits = decoder.apply(jnp.asarray(batch.tokens[:, :-1])) @ decoder.output_embedding.T
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[:, 1:, None], -1)[..., 0]
    batch.reference_logprobs[:, 1:] = own
    assert float(loss(PARAMS, batch)[0]) == pytest.approx(0, abs=1e-6)
    batch.reference_logprobs[:, 1:] += 0.3
    value, logs = loss(PARAMS, batch)
    expected = 30 * (np.exp(0.3) - 1 - 0.3)
    assert float(logs["kl"]) == pytest.approx(expected, rel=1e-3)
    assert float(value) == pytest.approx(0.1 * expected, rel=1e-3)


def test_windows_of_a_rollout_sum() -> None:
    """Two halves weighed alike give together what each gives alone."""
    config = RlLossConfig()
    turns = rollout()
    stream = token_stream(turns)
    windows = [
        cut_window(i, s, *stream) for i, s in enumerate(split(turns, 7, ContextPolicy(40, 7, 3)))
    ]
    assert len(windows) > 1
    loss = rl_loss(GRAPH, config, remat="none")
    whole = float(loss(PARAMS, pad_windows(windows, [0.5] * len(windows), 40))[0])
    parts = sum(float(loss(PARAMS, pad_windows([w], [0.5], 40))[0]) for w in windows)
    assert whole == pytest.approx(parts, rel=1e-5)
    assert sum(int(w.trained_mask.sum()) for w in windows) == 30
