"""Routing, its statistics and balance, and experts over a mesh of devices."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from simulated import devices

from klong_jax.core.errors import UserError
from klong_jax.models.config import DecoderConfig, MoeConfig
from klong_jax.models.decoder import build
from klong_jax.models.experts import ExpertWeights, mixture
from klong_jax.models.routing import balance_routers, load_statistics, route
from klong_jax.sft.loss import sft_loss
from klong_jax.training.accumulate import Trainer, init_state
from klong_jax.training.batches import WindowBatch
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer

MOE = MoeConfig(16, 3, 5, "sigmoid", True, scaling_factor=2.5, router_bias=True)
RNG = np.random.default_rng(0)


def test_a_mixture_is_the_sum_over_each_tokens_experts_one_by_one() -> None:
    x = RNG.normal(size=(2, 7, 4)).astype(np.float32)
    router = RNG.normal(size=(4, 16)).astype(np.float32)
    bias = RNG.normal(size=16).astype(np.float32)
    gate, up = (RNG.normal(size=(16, 4, 5)).astype(np.float32) for _ in range(2))
    down = RNG.normal(size=(16, 5, 4)).astype(np.float32)
    counted = np.arange(7) < np.array([[7], [4]])
    got, load = mixture(
        *map(jnp.asarray, (x, router, bias)),
        ExpertWeights(*map(jnp.asarray, (gate, up, down))),
        MOE,
        jnp.asarray(counted),
    )
    hits = np.zeros(16, int)
    for place in np.ndindex(2, 7):
        token = x[place]
        scores = 1 / (1 + np.exp(-token @ router))
        chosen = np.argsort(-(scores + bias))[:3]
        total = scores[chosen].sum()
        want = np.zeros(4)
        for expert in chosen:
            inner = token @ gate[expert]
            made = (inner / (1 + np.exp(-inner)) * (token @ up[expert])) @ down[expert]
            want += 2.5 * scores[expert] / total * made
            hits[expert] += counted[place]
        np.testing.assert_allclose(got[place], want, rtol=1e-4, atol=1e-5)
    assert load.tolist() == hits.tolist()


def test_the_bias_changes_who_is_chosen_and_not_what_they_weigh() -> None:
    logits = jnp.asarray([[0.0, 1.0, 2.0, 3.0]])
    config = MoeConfig(4, 2, 1, "sigmoid", normalise_top_k=False, router_bias=True)
    bias = jnp.asarray([9.0, 0.0, 0.0, 0.0])
    weights, chosen = route(logits, bias, config)
    assert chosen.tolist() == [[0, 3]]
    np.testing.assert_allclose(weights, jax.nn.sigmoid(jnp.asarray([[0.0, 3.0]])), rtol=1e-6)
    assert not jax.grad(lambda b: route(logits, b, config)[0].sum())(bias).any()


def test_even_loads_score_one_and_a_full_expert_as_many_as_there_are() -> None:
    even = load_statistics(jnp.full((2, 8), 5.0))
    assert float(even["expert_entropy"]) == pytest.approx(1)
    assert float(even["expert_max_load"]) == pytest.approx(1)
    full = load_statistics(jnp.eye(8)[:2] * 40)
    assert float(full["expert_entropy"]) == pytest.approx(0)
    assert float(full["expert_max_load"]) == pytest.approx(8)


CONFIG = DecoderConfig(
    30, 16, 3, 2, 1, 8, 32, moe=MoeConfig(8, 2, 8, "sigmoid", dense_layers=1, router_bias=True)
)


def skewed() -> tuple:
    """A decoder whose routers prefer two experts, and a batch for it."""
    graph, params = build(CONFIG, 0)
    flat = nnx.to_flat_state(params)
    bias = ("blocks", "moe", "router", "bias")
    prefer = jnp.tile(jnp.asarray([0.3, 0.3, 0, 0, 0, 0, 0, 0]), (2, 1))
    params = nnx.from_flat_state(
        {path: value.replace(prefer) if path == bias else value for path, value in flat}
    )
    tokens = RNG.integers(0, 30, (4, 32)).astype(np.int32)
    zeros, ones = np.zeros((4, 32), np.float32), np.ones((4, 32), np.float32)
    return graph, params, WindowBatch(tokens, ones, zeros, zeros, np.ones(4, np.float32))


def bias_of(params: object) -> np.ndarray:
    return np.asarray(dict(nnx.to_flat_state(params))["blocks", "moe", "router", "bias"][...])


def test_training_evens_out_the_load_and_moves_the_bias_by_nothing_else() -> None:
    graph, params, batch = skewed()
    before = bias_of(params)
    optimizer = make_optimizer(OptimizerConfig("adamw", 1e-3, weight_decay=0.5))
    rows = []
    for rate in (0.0, 0.03):
        trainer = Trainer(sft_loss(graph, remat="none"), optimizer, rate)
        state = init_state(jax.tree.map(jnp.copy, params), optimizer)
        for _ in range(25):
            state, row = trainer.step(state, [batch, batch], 1.0)
        rows.append(row)
        if not rate:
            np.testing.assert_array_equal(bias_of(state.params), before)
    assert rows[0]["expert_max_load"] > 3
    assert rows[1]["expert_max_load"] < 0.6 * rows[0]["expert_max_load"]
    assert rows[1]["expert_entropy"] > rows[0]["expert_entropy"]


def test_a_bias_moves_against_its_load_by_the_rate() -> None:
    _, params, _ = skewed()
    loads = jnp.asarray([[9, 5, 5, 5, 5, 5, 5, 1], [5] * 8])
    moved = balance_routers(params, loads, 0.125)
    change = bias_of(moved) - bias_of(params)
    np.testing.assert_allclose(change, [[-0.125, *[0] * 6, 0.125], [0] * 8], atol=1e-7)


def test_impossible_mixtures_are_named() -> None:
    with pytest.raises(UserError, match="top_k=9"):
        MoeConfig(8, 9, 4)
    with pytest.raises(UserError, match="dense_layers=3"):
        DecoderConfig(30, 16, 3, 2, 1, 8, 32, moe=MoeConfig(8, 2, 8, dense_layers=3))


@pytest.mark.slow
def test_experts_over_a_mesh_equal_one_device(measured: Callable[[str], None]) -> None:
    program = Path(__file__).with_name("expert_parallel.py")
    env = {**os.environ, "XLA_FLAGS": devices(8)}
    done = subprocess.run(
        [sys.executable, program], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        measured(str(row))
    assert len(rows) == 2
    for row in rows:
        assert row["loss"] < 1e-12
        assert row["gradients"] < 1e-10
        assert row["loads_equal"]
