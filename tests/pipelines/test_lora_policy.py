"""A policy trained by adapters is read merged, and trained on only with the same adapters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from klong_jax.core.errors import UserError
from klong_jax.pipelines.compose import config_dir, validate
from klong_jax.pipelines.config.training import LoraSection
from klong_jax.pipelines.policy import (
    Policy,
    adapted,
    describe_policy,
    fresh_state,
    load_policy,
    merged,
    new_policy,
)
from klong_jax.text.tokenizer import bundled_tokenizer
from klong_jax.training.accumulate import TrainState
from klong_jax.training.checkpoint import Checkpoints
from klong_jax.training.frozen import joined

ON = ("sft.lora.rank=4", "sft.optimizer.kind=adamw")


def settings(*overrides: str) -> Any:
    given = ["data.path=x", "model.hidden_size=16", "model.num_layers=1", *overrides]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return validate("sft", compose("sft", given))


def lora(**changed: Any) -> LoraSection:
    return LoraSection(**{"rank": 4, "alpha": 8.0, "targets": ("query", "down"), **changed})


@pytest.fixture
def base() -> Policy:
    return new_policy(settings().model, bundled_tokenizer(), 0)


def trained(policy: Policy) -> TrainState:
    """The state of an adapted policy whose adapters give something."""
    optimizer = settings(*ON).sft.optimizer.config(100, lora())
    state = fresh_state(policy, optimizer)
    learnt, frozen = optimizer.selection.split(state.params)
    assert sum(leaf.size for leaf in jax.tree.leaves(learnt)) < 0.1 * policy.parameters
    base = optimizer.selection.split(policy.params)[1]
    for one, two in zip(jax.tree.leaves(frozen), jax.tree.leaves(base), strict=True):
        assert one is two, "the base is not copied"
    params = jax.tree.map(lambda leaf: leaf + 0.1, learnt)
    return TrainState(joined(frozen, params), state.opt_state, state.step + 3)


def saved(folder: Path, policy: Policy, state: TrainState) -> None:
    describe_policy(folder, policy)
    checkpoints = Checkpoints(folder / "checkpoints", policy.identity)
    checkpoints.save(state, {})
    checkpoints.close()


def test_what_was_trained_by_adapters_is_read_merged(base: Policy, tmp_path: Path) -> None:
    policy = adapted(base, lora(), 0)
    state = trained(policy)
    saved(tmp_path, policy, state)
    expected = merged(replace(policy, params=state.params))
    found = load_policy(tmp_path)
    assert found.lora is None
    assert found.graph == base.graph == expected.graph
    assert found.identity == base.identity
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(base.params)]
    changed = set()
    for name, one, two, was in zip(
        names, *map(jax.tree.leaves, (found.params, expected.params, base.params)), strict=True
    ):
        np.testing.assert_array_equal(one, two)
        if (one != was).any():
            changed.add(name)
    assert len(changed) == 2
    assert all("query" in name or "down" in name for name in changed)
    # Read so, it is a policy like any other: it can be adapted again.
    assert adapted(found, lora(rank=2), 0).lora == lora(rank=2).config()


def test_other_adapters_do_not_go_on(base: Policy, tmp_path: Path) -> None:
    policy = adapted(base, lora(), 0)
    saved(tmp_path, policy, trained(policy))
    folder = tmp_path / "checkpoints"
    again = Checkpoints(folder, policy.identity)
    restored, _ = again.restore(
        fresh_state(policy, settings(*ON).sft.optimizer.config(100, lora()))
    )
    assert int(restored.step) == 3
    for section in (lora(rank=3), lora(alpha=4.0), lora(targets=("query",)), lora(rank=0)):
        other = adapted(base, section, 0)
        state = fresh_state(other, settings().sft.optimizer.config(100, section))
        with pytest.raises(UserError, match="belongs to another set of adapters") as refused:
            Checkpoints(folder, other.identity).restore(state)
        assert "(rank 4, alpha 8, down query, not " in str(refused.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("sft.lora.rank=4",), "set sft.optimizer.kind=adamw"),
        ((*ON, "sft.router_bias_rate=0.1"), "sft.router_bias_rate=0.1: moves what sft.lora.rank=4"),
        ((*ON, "sft.lora.targets=[experts]"), "sft.lora.targets"),
        ((*ON, "sft.lora.targets=[]"), "sft.lora.targets"),
        ((*ON, "sft.lora.alpha=0"), "sft.lora.alpha"),
    ],
)
def test_contradictory_settings_are_refused(given: tuple[str, ...], said: str) -> None:
    settings(*ON)
    with pytest.raises(UserError, match=r"^[^\n]+$") as refused:
        settings(*given)
    assert said in str(refused.value)
