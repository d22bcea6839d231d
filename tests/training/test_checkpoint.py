"""Checkpoints come back bit for bit, and another model's are refused by name."""

import resource
from functools import partial
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


def test_a_save_holds_what_the_state_was_when_it_began(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @partial(jax.jit, donate_argnums=0)
    def spoil(state: TrainState) -> TrainState:
        return jax.tree.map(lambda leaf: leaf * 0 - 1, state)

    checkpoints = Checkpoints(tmp_path, {})
    for step in (1, 2, 3):
        state = TrainState({"w": jnp.full((1000, 1000), step / 4)}, (), jnp.int32(step))
        checkpoints.save(state, {})
        spoiled = spoil(state)
        assert (np.asarray(spoiled.params["w"]) == -1).all()
        restored, _ = checkpoints.restore(spoiled)
        assert (np.asarray(restored.params["w"]) == step / 4).all()
    checkpoints.close()
    assert not caplog.records, "nothing is said of what goes well"


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 4.0, 6: 5.0}
    for steps in ((1, 2, 3), (4, 5, 6)):
        checkpoints = Checkpoints(tmp_path, {}, keep=1, keep_best=2)
        for step in steps:
            state = TrainState({"w": jnp.full(3, step)}, (), jnp.int32(step))
            checkpoints.save(state, {}, losses[step])
        checkpoints.close()
    again = Checkpoints(tmp_path, {}, keep=1, keep_best=2)
    assert (again.steps(), again.latest()) == ([2, 3, 6], 6)
    like = {"w": jnp.zeros(3, int)}
    assert again.restore_params(like)["w"][0] == 6
    assert again.restore_params(like, step=2)["w"][0] == 2
    with pytest.raises(UserError, match=r"holds no checkpoint 5; choose one of 2, 3, 6\.$"):
        again.restore_params(like, step=5)


def test_another_optimiser_is_refused_in_a_sentence(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(make_state(0, 1), {})
    params = make_state(0, 0).params
    other = init_state(params, make_optimizer(OptimizerConfig("adamw", 1e-2)))
    with pytest.raises(UserError, match=rf"^{tmp_path}: .* optimiser .*`optimizer`"):
        checkpoints.restore(other)
    assert checkpoints.restore_params(params)
    checkpoints.close()


def test_what_a_cut_off_save_left_is_neither_read_nor_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(make_state(0, 1), {})
    checkpoints.close()
    half = tmp_path / "2.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "params").mkdir()
    reading = Checkpoints(tmp_path, {})
    assert reading.latest() == 1
    reading.close()
    assert half.exists(), "another process may be writing it"
    writing = Checkpoints(tmp_path, {}, tidy=True)
    writing.save(make_state(0, 2), {})
    writing.close()
    assert {path.name for path in tmp_path.iterdir()} >= {"1", "2"}
    assert not half.exists()


def test_a_write_that_fails_behind_the_scenes_is_said_at_the_next_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.random((300, 1000), np.float32))}
    checkpoints.save(TrainState(params, (), jnp.int32(1)), {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        checkpoints.save(TrainState(params, (), jnp.int32(2)), {})
        with pytest.raises(UserError, match=r"cannot be written \(File too large\); free"):
            checkpoints.save(TrainState(params, (), jnp.int32(3)), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Checkpoints(tmp_path, {}).latest() == 1
    assert not [record for record in caplog.records if record.exc_info]


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
