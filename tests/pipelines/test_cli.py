"""`klong` as a process: exit codes, exactly one sentence, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from klong_jax.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
LEAF = {
    "id": "a",
    "requirements": "it runs",
    "weight": 1,
    "sub_tasks": [],
    "task_category": "Code Execution",
}

Klong = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}


@pytest.fixture
def klong(tmp_path: Path) -> Klong:
    (tmp_path / "here").mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "klong_jax.cli", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path / "here",
            env=environment(),
        )

    return run


def rubric(path: Path, **fields: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**LEAF, **fields}))
    return path


def test_help_names_every_command(klong: Klong) -> None:
    for arguments in ([], ["--help"]):
        done = klong(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert all(f"  {command} " in done.stdout for command in COMMANDS)


def test_help_of_a_command_shows_composed_values(klong: Klong) -> None:
    done = klong("split", "--help", "splitting.overlap=77")
    assert (done.returncode, done.stderr) == (0, "")
    assert "overlap: 77" in done.stdout
    assert "# Longest context the model may see" in done.stdout


def test_help_is_quick_to_import() -> None:
    program = (
        "import sys\nfrom klong_jax.cli import main\nmain(['--help'])\n"
        "heavy = {'jax', 'hydra', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "there is no command 'train'; choose one of recipe,"),
        (["split"], "data.path is not given"),
        (["split", "data.pth=x"], "did you mean data.path?"),
        (["split", "--quick"], "there is no option --quick"),
        (["rubric", "path=x", "--skip-bad"], "--skip-bad is an option of klong split"),
        (["sft", "data.path=x", "--stats"], "--stats is an option of klong split only"),
        (["split", "data.path"], "cannot read the override"),
        (["split", "data.path=["], "cannot read the override"),
        (["split", "~data.nothing"], "data.nothing"),
        (["split", "data.path=x", "+unheard=1"], "unheard is no setting of klong split"),
        (["split", "data.path=x", "splitting.overlap=32768"], "overlap + reserve"),
        (["split", "data.path=x", "splitting.overlap=much"], 'splitting.overlap="much"'),
        (["recipe", "profile=huge"], "profile=huge: there is no such profile"),
        (["recipe", "hydra/launcher=none"], "none"),
        (["rubric", "path=a,b"], "add --multirun"),
        (["rubric", "--cfg"], "--cfg needs a value"),
        (["rubric", "path=nowhere.json"], "nowhere.json: no such file"),
        (["report", "path=nowhere"], "nowhere/report.json: no such file"),
        (["sandbox", "token_env=KLONG_NO_SUCH"], "KLONG_NO_SUCH is not set"),
        (["sandbox", "host=0.0.0.0", "port=0"], "set a token"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(
    klong: Klong, tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = klong(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("klong")
    assert said in done.stderr
    assert list((tmp_path / "here").iterdir()) == []


def test_a_broken_config_file_is_one_sentence(klong: Klong, tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\nfrom klong_jax import cli\n"
        "from klong_jax.pipelines import compose\n"
        "folder = pathlib.Path(sys.argv[1])\ncompose.config_dir = lambda: folder\n"
        "cli.main(['rubric', 'path=x'])"
    )
    (tmp_path / "rubric.yaml").write_text("path: x\noutput: [\n")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "rubric.yaml:3: not valid YAML" in done.stderr


def test_multirun_runs_each_value(klong: Klong, tmp_path: Path) -> None:
    first = rubric(tmp_path / "a.json")
    second = rubric(tmp_path / "b.json", score=1)
    done = klong("rubric", "--multirun", f"path={first},{second}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "a.json" in done.stdout and "b.json" in done.stdout
    assert list((tmp_path / "here").iterdir()) == []


def test_a_bad_job_of_a_multirun_does_not_end_the_others(klong: Klong, tmp_path: Path) -> None:
    good = rubric(tmp_path / "good.json")
    done = klong("rubric", "--multirun", f"path={tmp_path}/bad.json,{good}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "bad.json: no such file" in done.stderr
    assert "good.json" in done.stdout


def test_cfg_prints_the_settings(klong: Klong) -> None:
    done = klong("split", "--cfg", "job", "--skip-bad", "--stats")
    assert (done.returncode, done.stderr) == (0, "")
    assert "skip_bad: true" in done.stdout
    assert "stats: true" in done.stdout


def test_interrupt_says_how_to_resume(tmp_path: Path) -> None:
    """A real SIGINT, while the command waits for a file's writer."""
    pipe = tmp_path / "rubric.json"
    os.mkfifo(pipe)
    program = [sys.executable, "-m", "klong_jax.cli", "rubric", f"path={pipe}"]
    klong = subprocess.Popen(
        program,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # Tests that a shell runs in the background are deaf to SIGINT, and so were their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    # Opening the pipe returns once the command reads from it.
    with pipe.open("w"):
        klong.send_signal(signal.SIGINT)
        _, said = klong.communicate()
    assert said == "interrupted; run the same command again to resume\n"
    assert klong.returncode == 130
