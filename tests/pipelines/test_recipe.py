"""The recipe as a user runs it: killed, resumed, repeated - and, in full size, learning."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
KILLS = 10


def command(root: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "klong_jax.cli", "recipe", f"run.root={root}", *overrides]


def run(
    root: Path, *overrides: str, timeout: float = 600, env: dict[str, str] | None = None
) -> Path:
    """Runs to the end; returns the run's folder."""
    done = subprocess.run(
        command(root, *overrides), capture_output=True, text=True, timeout=timeout, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report: " in done.stdout
    (folder,) = root.iterdir()
    return folder


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must repeat: losses, rollouts, scores."""
    report = json.loads((folder / "report.json").read_text())
    sft = [json.loads(line) for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]
    with sqlite3.connect(folder / "rollouts.sqlite") as db:
        rows = db.execute("SELECT request_id, trajectory, judgement FROM results ORDER BY 1")
        rollouts = {name: (json.loads(t), json.loads(j)) for name, t, j in rows}
    for trajectory, judgement in rollouts.values():
        # A restarted rollout is a later attempt; nothing else differs.
        trajectory["trajectory_id"] = judgement["trajectory_id"] = ""
    return {
        "sft": [(row["step"], row["loss"]) for row in sft],
        "rl": report["rl_steps"],
        "evals": report["evals"],
        "rollouts": rollouts,
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run that nothing interrupted, and its seconds."""
    started = time.monotonic()
    folder = run(tmp_path_factory.mktemp("reference"), "profile=tiny", "seed=0")
    return folder, time.monotonic() - started


def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(
    tmp_path: Path, reference: tuple[Path, float]
) -> None:
    folder, seconds = reference
    expected = outcome(folder)
    rng = random.Random(os.environ.get("KLONG_KILL_SEED", "0"))
    killed = 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            command(tmp_path, "profile=tiny", "seed=0"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=rng.uniform(0.1, 0.35) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
    assert killed >= KILLS // 2
    resumed = outcome(run(tmp_path, "profile=tiny", "seed=0"))
    assert resumed["rollouts"].keys() == expected["rollouts"].keys()
    assert resumed == expected


def test_a_finished_run_is_shown_again_without_work(reference: tuple[Path, float]) -> None:
    folder, _ = reference
    first = outcome(folder)
    started = time.time()
    assert run(folder.parent, "profile=tiny", "seed=0") == folder
    assert outcome(folder) == first
    assert (folder / "demonstrations.jsonl").stat().st_mtime < started


def test_the_smoke_profile_learns(tmp_path: Path) -> None:
    """What the README promises of `launch/local.sh`."""
    # Compiled as users' runs are, not as tests.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    folder = run(tmp_path, "profile=smoke", "seed=0", timeout=2400, env=env)
    evals = json.loads((folder / "report.json").read_text())["evals"]
    mean = {
        policy: sum(row["score"] for row in rows) / len(rows)
        for policy in ("base", "sft", "rl")
        if (rows := [row for row in evals if row["policy"] == policy])
    }
    assert mean["sft"] >= 0.3
    assert mean["sft"] >= 5 * mean["base"]
    assert mean["rl"] > mean["sft"]
    solved = [row for row in evals if row["score"] >= 0.99 and row["context_ratio"] >= 4]
    assert solved
    turns = [
        len(json.loads(line)["messages"]) // 2
        for line in (folder / "demonstrations.jsonl").read_text().splitlines()
    ]
    assert max(turns) >= 200
