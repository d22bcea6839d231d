"""Schedules, frozen parameters and the average of parameters, on the decoder's own parameters."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.models.config import DecoderConfig
from klong_jax.models.decoder import build
from klong_jax.training.accumulate import TrainState, init_state
from klong_jax.training.average import served_params
from klong_jax.training.checkpoint import Checkpoints
from klong_jax.training.frozen import Selection, joined
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer
from klong_jax.training.schedules import make_schedule

PARAMS = build(DecoderConfig(20, 8, 2, 2, 1, 4, 16), 0)[1]


def rates(kind: Any, warmup: int, total: int, share: float = 0.25) -> list[float]:
    rate = make_schedule(kind, 2.0, warmup, total, share)
    return [float(rate(step)) for step in range(total)]


def test_each_schedule_goes_as_it_is_called() -> None:
    assert rates("constant", 3, 6) == pytest.approx([0.5, 1, 1.5, 2, 2, 2])
    assert rates("linear", 2, 6) == pytest.approx([1, 2, 1.55, 1.1, 0.65, 0.2])
    assert rates("wsd", 2, 8) == pytest.approx([1, 2, 2, 2, 2, 2, 1.1, 0.2])
    cosine = optax.schedules.warmup_cosine_decay_schedule(0.0, 2.0, 2, 6, 0.2)
    assert rates("cosine", 2, 6) == [float(cosine(step)) for step in range(1, 7)]


@given(
    kind=st.sampled_from(["cosine", "linear", "wsd"]),
    total=st.integers(2, 40),
    warmup=st.integers(0, 39),
    share=st.floats(0.01, 1),
)
def test_every_schedule_trains_at_once_peaks_and_ends_at_a_tenth(
    kind: str, total: int, warmup: int, share: float
) -> None:
    warmup %= total
    found = rates(kind, warmup, total, share)
    assert min(found) > 0
    assert max(found) <= 2.0 + 1e-6
    peak = found.index(max(found))
    assert found[:peak] == sorted(found[:peak])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    if kind != "wsd" or round(share * total):
        assert found[-1] == pytest.approx(0.2)


def steps(config: OptimizerConfig, count: int) -> list[TrainState]:
    """The states of so many steps, each against gradients of ones."""
    optimizer, selection = make_optimizer(config), config.selection

    @jax.jit
    def step(state: TrainState) -> TrainState:
        learnt, frozen = selection.split(state.params)
        grads = jax.tree.map(jnp.ones_like, learnt)
        updates, opt_state = optimizer.update(grads, state.opt_state, learnt)
        params = joined(optax.apply_updates(learnt, updates), frozen)
        return TrainState(params, opt_state, state.step + 1)

    states = [init_state(PARAMS, optimizer, selection)]
    for _ in range(count):
        states.append(step(states[-1]))
    return states


def named(tree: Any) -> dict[str, np.ndarray]:
    return {
        ".".join(key.key for key in path if hasattr(key, "key")): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_frozen_stays_and_the_rest_trains_as_if_alone(kind: Any) -> None:
    frozen = ("embedding", "blocks.*.scale")
    free = steps(OptimizerConfig(kind, 0.01, clip_norm=1e9), 2)[-1]
    held = steps(OptimizerConfig(kind, 0.01, clip_norm=1e9, frozen=frozen), 2)[-1]
    before, after, expected = named(PARAMS), named(held.params), named(free.params)
    still = {name for name in before if np.array_equal(before[name], after[name])}
    assert still == {"embedding", *(n for n in before if n.endswith("norm.scale") and "." in n[5:])}
    for name in before.keys() - still:
        np.testing.assert_allclose(after[name], expected[name], rtol=1e-6)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(s.opt_state)) for s in (held, free)]
    assert sizes[0] < sizes[1], "no state is kept for what is frozen"


def test_an_average_of_what_is_learnt_is_served_with_what_is_frozen(tmp_path: Path) -> None:
    config = OptimizerConfig("adamw", 0.01, frozen=("embedding", "blocks.*"), ema_decay=0.75)
    first, *_, last = steps(config, 2)
    assert named(last.opt_state.average).keys() == {"norm.scale"}
    served = named(served_params(last.params, last.opt_state))
    assert served.keys() == named(PARAMS).keys()
    moved = {name for name, value in named(PARAMS).items() if (served[name] != value).any()}
    assert moved == {"norm.scale"}
    assert (served["norm.scale"] != named(last.params)["norm.scale"]).all()

    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(last, {})
    restored, _ = checkpoints.restore(first)
    assert jax.tree.structure(restored) == jax.tree.structure(last)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(last), strict=True):
        np.testing.assert_array_equal(got, want)
    for name, value in named(checkpoints.restore_params(PARAMS)).items():
        np.testing.assert_array_equal(value, served[name])
    checkpoints.close()


@pytest.mark.parametrize(
    ("frozen", "said"),
    [
        (("blocks.qeury.kernel",), "blocks.qeury.kernel: is the name of no parameter; the closest "
         "is blocks.query.kernel"),
        (("embedding", "lora*"), r"frozen=lora\*: is the name of no parameter"),
        (("*",), "leaves nothing to train"),
    ],
)  # fmt: skip
def test_impossible_patterns_are_named(frozen: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        init_state(PARAMS, make_optimizer(OptimizerConfig()), Selection(frozen))


def test_the_average_follows_the_parameters_and_is_what_a_policy_is_read_with(
    tmp_path: Path,
) -> None:
    plain = steps(OptimizerConfig("adamw", 0.01), 3)
    states = steps(OptimizerConfig("adamw", 0.01, ema_decay=0.75), 3)
    expected = named(PARAMS)
    for state in states[1:]:
        expected = {n: 0.75 * expected[n] + 0.25 * v for n, v in named(state.params).items()}
    last = states[-1]
    for name, value in named(served_params(last.params, last.opt_state)).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-7)
        np.testing.assert_array_equal(named(last.params)[name], named(plain[-1].params)[name])
    assert served_params(plain[-1].params, plain[-1].opt_state) is plain[-1].params

    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(last, {})
    restored, _ = checkpoints.restore(states[0])
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(last), strict=True):
        np.testing.assert_array_equal(got, want)
    read = named(checkpoints.restore_params(PARAMS))
    for name, value in named(served_params(last.params, last.opt_state)).items():
        np.testing.assert_array_equal(read[name], value)
    with pytest.raises(UserError, match="ema_decay"):
        checkpoints.restore(plain[0])
    checkpoints.close()
