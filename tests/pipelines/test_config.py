"""Settings: what configs/ holds is valid, and what contradicts itself is refused."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from klong_jax.cli import COMMANDS
from klong_jax.core.errors import UserError
from klong_jax.pipelines.compose import config_dir, explain, help_text, validate
from klong_jax.pipelines.config.commands import CONFIGS, RecipeConfig, SplitConfig
from klong_jax.rl.stages import Stage

GIVEN = {
    "split": ["data.path=x"],
    "sft": ["data.path=x"],
    "factory": ["output=y"],
    "distill": ["tasks=x", "output=y"],
    "rl": ["policy=x", "tasks=y"],
    "eval": ["policy=x", "tasks=y"],
    "convert": ["source=x", "output=y"],
    "rubric": ["path=x"],
    "aot": ["topology=v5e:2x2"],
    "bench": ["what=attention"],
    "report": ["path=x"],
}

STAGE = "{timeout_s: 5, max_steps: 2, min_steps: 1, advance_score: 0.5}"


def composed(command: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(command, list(overrides))


def settings(command: str, *overrides: str) -> Any:
    return validate(command, composed(command, *overrides))


def test_every_command_has_settings_and_defaults() -> None:
    assert list(COMMANDS) == list(CONFIGS)
    assert {path.stem for path in config_dir().glob("*.yaml")} == set(COMMANDS)


@pytest.mark.parametrize("command", CONFIGS)
def test_the_defaults_are_valid_and_explained(command: str) -> None:
    settings(command, *GIVEN.get(command, []))
    unexplained = [name for name, said in explain(command).items() if not said]
    assert unexplained == []
    text = help_text(command, [])
    for name in explain(command):
        assert f"{name.rpartition('.')[2]}:" in text


@pytest.mark.parametrize("profile", sorted(p.stem for p in config_dir().glob("profile/*")))
def test_every_profile_is_a_valid_recipe(profile: str) -> None:
    recipe = settings("recipe", f"profile={profile}")
    assert isinstance(recipe, RecipeConfig)
    assert recipe.profile == profile


def test_values_become_what_the_pipelines_use() -> None:
    split = settings(
        "split", "data.path=f.jsonl", "splitting.context_limit=4096", "splitting.overlap=512"
    )
    assert isinstance(split, SplitConfig)
    assert split.data.path == Path("f.jsonl")
    assert (split.splitting.policy().limit, split.splitting.policy().overlap) == (4096, 512)
    stages = settings("recipe", f"rl.stages=[{STAGE}]").rl.timeline()
    assert stages == (Stage(5.0, 2, 0.5, 1),)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["splitting.overlap=4096"], "overlap + reserve"),
        (["splitting.context_limit=abc"], 'splitting.context_limit="abc"'),
        (["seed=true"], "seed=true"),
        (["seed=-1"], "seed=-1"),
        (["+splitting.limit=3"], "splitting.limit is no setting"),
        (["model.num_heads=3"], "multiple of num_kv_heads"),
        (["sft.steps=20"], "warmup_steps"),
        (["sft.pack=perhaps"], 'sft.pack="perhaps"'),
        (
            ["sft.optimizer.schedule=wsd", "sft.optimizer.decay_share=1"],
            "decay_share=1.0: leaves 0 of sft.steps=320 for the 20 warm-up steps",
        ),
        (["sft.optimizer.schedule=sine"], "'linear' or 'wsd'"),
        (["rl.optimizer.schedule=linear"], "rl.optimizer.schedule=linear"),
        (["model.head_dim=15"], "model.head_dim=15"),
        (["rl.rollouts=1"], "rl.rollouts=1"),
        (["rl.stages=[]"], "rl.stages=[]"),
        ([f"rl.stages=[{STAGE}, {STAGE}]"], "must be larger"),
        (["engine.temperature=0"], "RL compares samples"),
        (["~seed"], "seed is missing"),
        (["clock.kind=sundial"], "'virtual' or 'wall'"),
        (["run.id=a/b"], "run.id"),
        (["seed=${nowhere}"], "nowhere"),
        (["mesh.fsdp=-1"], "mesh.fsdp=-1"),
        (["kernels.attention=fast"], "kernels.attention=fast: there is no such backend; choose"),
        (["+kernels.softmax=cpu"], "kernels.softmax is no setting"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        settings("recipe", *overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["processes.count=2"], "give all three or none"),
        (
            ["processes.coordinator=a:1", "processes.count=2", "processes.index=2"],
            "processes.index=2: must be below processes.count=2",
        ),
        (["processes.coordinator=a"], 'processes.coordinator="a"'),
    ],
)
def test_processes_are_described_in_full(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        settings("sft", "data.path=x", *overrides)
    assert said in str(caught.value)


@pytest.mark.parametrize("command", ["split", "sft"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("splitting.pin=all", "write opening, reading, turns:N or tokens:N"),
        ("splitting.mode=sliding", "'sliding_no_pin' or 'truncate_tail'"),
        ("splitting.fade=[64,128]", "must not grow with age"),
        ("splitting.fade=[64,8]", "splitting.fade.1=8"),
        ("splitting.oversize=drop", "'cut' or 'refuse'"),
    ],
)
def test_splitting_is_refused_by_name(command: str, override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(command, "data.path=x", override)
    assert said in str(caught.value)


def test_a_corpus_is_drawn_as_svg_or_html_only() -> None:
    with pytest.raises(UserError, match=r"plot=a\.png: must end in \.svg or \.html"):
        settings("split", "data.path=x", "plot=a.png")
    assert settings("split", "data.path=x", "plot=a.html").plot == Path("a.html")


def test_what_must_be_given_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"^data\.path is not given: add data\.path=VALUE"):
        settings("split")
