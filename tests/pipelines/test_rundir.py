"""Run folders: names, locks across processes, stages, bad places."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import read_json
from klong_jax.pipelines.compose import config_dir, validate
from klong_jax.pipelines.config.commands import RecipeConfig
from klong_jax.pipelines.rundir import open_run

ROOT = Path(__file__).resolve().parents[2]


def recipe(root: Path, *overrides: str) -> RecipeConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        settings = validate("recipe", compose("recipe", [f"run.root={root}", *overrides]))
    assert isinstance(settings, RecipeConfig)
    return settings


def opened(settings: RecipeConfig) -> Any:
    return open_run("recipe", settings, settings.run)


def name(settings: RecipeConfig) -> str:
    with opened(settings) as run:
        return str(run.run_id)


def test_the_same_settings_resume_and_changed_ones_do_not_mix(tmp_path: Path) -> None:
    first = name(recipe(tmp_path))
    assert first.startswith("recipe-smoke-seed0-")
    assert name(recipe(tmp_path)) == first
    assert name(recipe(tmp_path, "seed=1")).startswith("recipe-smoke-seed1-")
    assert name(recipe(tmp_path, "sft.steps=50")) != first
    assert name(recipe(tmp_path / "elsewhere")) == first, "where a run lives is not what it is"
    moved = recipe(tmp_path, "mesh.tensor=2", "kernels.attention=reference")
    assert name(moved) == first, "nor is on what it computes"
    shown = recipe(tmp_path, "sft.log_to=[tensorboard]", "rl.log_to=[wandb]", "sft.keep_best=3")
    assert name(shown) == first, "nor what it shows and keeps"


def test_fresh_takes_the_next_suffix(tmp_path: Path) -> None:
    names = [name(recipe(tmp_path, "run.fresh=true")) for _ in range(3)]
    assert names == [names[0], f"{names[0]}-2", f"{names[0]}-3"]
    assert name(recipe(tmp_path)) == names[0]
    assert name(recipe(tmp_path, f"run.id={names[2]}")) == names[2]


def test_a_named_run_keeps_its_settings(tmp_path: Path) -> None:
    assert name(recipe(tmp_path, "run.id=mine", "seed=7")) == "mine"
    assert name(recipe(tmp_path, "run.id=mine")) == "mine", "nothing was done with other settings"
    (tmp_path / "mine" / "sft").mkdir()
    with pytest.raises(UserError, match=r"mine: holds a run of other settings \(seed, sft\)"):
        name(recipe(tmp_path, "run.id=mine", "seed=1", "sft.steps=50"))
    assert read_json(tmp_path / "mine" / "config.json")["seed"] == 0


def test_stages_are_remembered(tmp_path: Path) -> None:
    with opened(recipe(tmp_path)) as run:
        assert run.done("sft") is None
        run.mark("sft", {"loss": 0.5})
    with opened(recipe(tmp_path)) as run:
        assert run.done("sft") == {"loss": 0.5}
        assert run.done("rl") is None


def test_an_interrupted_fresh_run_tells_its_name(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt, match=r"run\.id=mine instead of run\.fresh=true"),
        opened(recipe(tmp_path, "run.fresh=true", "run.id=mine")),
    ):
        raise KeyboardInterrupt


HOLDER = """
import sys
from pathlib import Path
from test_rundir import opened, recipe
with opened(recipe(Path(sys.argv[1]))) as run:
    print(run.run_id, flush=True)
    sys.stdin.read()
"""


def test_two_processes_never_share_a_run(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
    ) as holder:
        assert holder.stdout is not None
        held = holder.stdout.readline().strip()
        with pytest.raises(UserError, match=f"{held}: is in use by process {holder.pid};"):
            name(recipe(tmp_path))
        assert name(recipe(tmp_path, "run.fresh=true")) == f"{held}-2"
        holder.kill()
        holder.wait()
    assert name(recipe(tmp_path)) == held, "a killed process holds nothing"


def test_bad_places_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot hold runs .*run\.root"):
        name(recipe(tmp_path / "file"))
    with pytest.raises(UserError, match=r"sub: cannot hold runs"):
        name(recipe(tmp_path / "file" / "sub"))
    with pytest.raises(UserError, match=r"file: cannot be used for a run"):
        name(recipe(tmp_path, "run.id=file"))
    with pytest.raises(UserError, match=r"cannot hold runs"):
        name(recipe(Path("/proc/runs")))


FILLER = """
import sys
from pathlib import Path
from test_rundir import opened, recipe
from klong_jax.core.errors import UserError
root = Path(sys.argv[1])
with (root / "ballast").open("wb", buffering=0) as ballast:
    try:
        while True:
            ballast.write(bytes(4096))
    except OSError:
        pass
try:
    with opened(recipe(root)):
        pass
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    if shutil.which("bwrap") is None:
        reason = "no bubblewrap on this machine: apt-get install bubblewrap"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    small = ["bwrap", "--dev-bind", "/", "/", "--size", "200000", "--tmpfs", str(tmp_path)]
    done = subprocess.run(
        [*small, sys.executable, "-c", FILLER, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "No space left on device" in done.stdout
