"""Checkpoints come back bit for bit, and another model's are refused by name."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klong_jax.core.errors import UserError
from klong_jax.models.config import DecoderConfig
from klong_jax.models.decoder import build
from klong_jax.training.accumulate import TrainState, init_state
from klong_jax.training.checkpoint import Checkpoints
from klong_jax.training.metrics import MetricsLog, read_metrics
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer

MODEL = DecoderConfig(20, 8, 2, 2, 1, 4, 16)


def make_state(seed: int, step: int) -> TrainState:
    fresh = init_state(build(MODEL, seed)[1], make_optimizer(OptimizerConfig("muon", 1e-2)))
    return TrainState(fresh.params, fresh.opt_state, jnp.int32(step))


def test_state_and_progress_come_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {"model": MODEL.fingerprint}, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(make_state(step, step), {"position": step * 10})
    checkpoints.close()
    again = Checkpoints(tmp_path, {"model": MODEL.fingerprint})
    assert again.latest() == 3
    state, progress = again.restore(make_state(99, 0))
    assert progress["position"] == 30
    assert int(state.step) == 3
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(3, 3)), strict=True):
        np.testing.assert_array_equal(got, want)
    params = again.restore_params(make_state(99, 0).params)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {"model": "a" * 64, "tokenizer": "t"})
    checkpoints.save(make_state(0, 1), {})
    checkpoints.close()
    other = Checkpoints(tmp_path, {"model": "b" * 64, "tokenizer": "t"})
    with pytest.raises(UserError, match=r"belongs to another model \(aaaaaaaaaaaa"):
        other.restore(make_state(0, 0))


def test_an_empty_folder_and_an_impossible_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        Checkpoints(tmp_path / "none", {}).restore(make_state(0, 0))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another runs folder"):
        Checkpoints(tmp_path / "file" / "sub", {})


def test_metrics_of_steps_that_will_be_repeated_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0 / step})
    with path.open("a") as handle:
        handle.write('{"step": 4, "lo')  # a line torn by a crash
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    MetricsLog(path, 2).write({"step": 3, "loss": 0.5})
    assert [row["loss"] for row in read_metrics(path)] == [1.0, 0.5, 0.5]
