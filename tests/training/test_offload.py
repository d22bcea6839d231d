"""An optimiser's state in the host's memory: the same updates, and less of the device's memory."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from klong_jax.models.config import DTypes
from klong_jax.models.decoder import build
from klong_jax.models.presets import preset
from klong_jax.sft.loss import sft_loss
from klong_jax.training.accumulate import Trainer, TrainState, init_state
from klong_jax.training.average import served_params
from klong_jax.training.batches import WindowBatch
from klong_jax.training.checkpoint import Checkpoints
from klong_jax.training.offload import Optimizer, take_step
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer

# A stack of layers and what stands alone.
PARAMS = nnx.State(
    {
        "blocks": {"query": {"kernel": nnx.Param(jax.random.normal(jax.random.key(0), (3, 8, 8)))}},
        "norm": {"scale": nnx.Param(jnp.ones(8))},
    }
)
HOST, DEVICE = "pinned_host", "device"


def stepped(config: OptimizerConfig, count: int, state: TrainState | None = None) -> TrainState:
    """A state after so many steps against random gradients, too large for the clip."""
    optimizer, step = compiled(config)
    state = state or init_state(PARAMS, optimizer)
    for _ in range(count):
        rng = np.random.default_rng(int(state.step))
        grads = jax.tree.map(lambda x, rng=rng: rng.normal(size=x.shape).astype(x.dtype), PARAMS)
        state = step(state, grads)
    return state


@cache
def compiled(config: OptimizerConfig) -> tuple[Optimizer, Callable[..., TrainState]]:
    optimizer = make_optimizer(config)

    @jax.jit
    def step(state: TrainState, grads: Any) -> TrainState:
        params, opt_state = take_step(optimizer, grads, state.opt_state, state.params)
        return TrainState(params, opt_state, state.step + 1)

    return optimizer, step


def kinds(tree: Any) -> set[str]:
    """Where the arrays of parameters in a tree live."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.State))
    states = [node for node in nodes if isinstance(node, nnx.State)]
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(states)}


def off(found: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


@pytest.mark.parametrize("given", [{"ema_decay": 0.75}, {"kind": "muon"}])
def test_the_updates_are_those_of_a_state_on_the_device(given: dict[str, Any]) -> None:
    config = {"learning_rate": 0.01, **given}
    plain = stepped(OptimizerConfig(**config), 3)
    held = stepped(OptimizerConfig(**config, offload=True), 3)
    assert kinds(plain.opt_state) == kinds(held.params) == {DEVICE}
    assert kinds(held.opt_state) == {HOST}
    # A step moves a parameter by 0.01; programs differ by a rounding of it.
    assert off(held.params, PARAMS) > 0.02
    assert off(held.params, plain.params) < 3e-7
    assert off(held.opt_state, plain.opt_state) < 3e-7


def test_a_state_in_the_hosts_memory_is_saved_and_goes_on(tmp_path: Path) -> None:
    config = OptimizerConfig("adamw", 0.01, ema_decay=0.75, offload=True)
    half, whole = stepped(config, 2), stepped(config, 3)
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(half, {})
    restored, _ = checkpoints.restore(stepped(config, 0))
    assert kinds(restored.opt_state) == {HOST}
    assert off(restored, half) == 0
    assert off(stepped(config, 1, restored), whole) == 0
    served = served_params(half.params, half.opt_state)
    assert kinds(served) == {DEVICE}
    assert off(checkpoints.restore_params(PARAMS), served) == 0
    checkpoints.close()


@pytest.mark.gpu
def test_a_gpu_holds_less_at_its_peak(measured: Callable[[str], None]) -> None:
    """Of a model in which parameters and their states outweigh activations."""
    rows = np.ones((1, 512), np.float32)
    batch = WindowBatch(rows.astype(np.int32), rows, 0 * rows, 0 * rows, np.ones(1, np.float32))
    peaks: list[float] = []
    # The lower peak first: a device tells only the highest so far.
    for offload in (True, False):
        graph, params = build(preset("qwen3_0_6b"), 0, DTypes("float32", "bfloat16"))
        moments = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**30
        optimizer = make_optimizer(OptimizerConfig("adamw", 1e-4, offload=offload))
        state = init_state(params, optimizer)
        trainer = Trainer(sft_loss(graph, remat="full"), optimizer)
        for _ in range(2):
            state, logs = trainer.step(state, [batch], 512.0)
        stats = jax.devices()[0].memory_stats() or {}
        peaks.append(stats["peak_bytes_in_use"] / 2**30)
        measured(f"offload={offload}: loss {logs['loss']:.6f}, peak {peaks[-1]:.2f} GiB")
        assert kinds(state.opt_state) == {HOST if offload else DEVICE}
        del state, params
    assert peaks[0] < peaks[1] - moments / 4
