"""`klong sft` and RL on meshes and in several processes: the same numbers as on one device.

Devices are simulated on the CPU, in processes of their own because their number is fixed at start.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import simulated

from klong_jax.core.errors import UserError
from klong_jax.pipelines.policy import load_policy

ROOT = Path(__file__).resolve().parents[2]
RL_WORKER = Path(__file__).with_name("rl_worker.py")
TOLERANCE = 1e-5
STEPS, SAVE_EVERY = 12, 4
CLOCKED = {"seconds", "waiting_share", "trained_tokens_per_s", "trajectory_tokens_per_s"}
SETTINGS = [
    "run.id=run",
    *(f"model.{name}" for name in ("hidden_size=16", "num_layers=2", "num_heads=4")),
    *(f"model.{name}" for name in ("num_kv_heads=2", "head_dim=8", "intermediate_size=32")),
    *("splitting.context_limit=128", "splitting.overlap=32", "splitting.reserve=24"),
    *(f"sft.steps={STEPS}", "sft.batch=4", "sft.micro_batch=2", f"sft.save_every={SAVE_EVERY}"),
    *(f"sft.optimizer.{name}" for name in ("kind=adamw", "learning_rate=0.003", "warmup_steps=2")),
]  # fmt: skip
# What compiles fastest, and saves only when it must.
SHORT = ("sft.remat=none", "model.num_layers=1", "sft.steps=24", "sft.save_every=1000")
# Windows of a trajectory come three together and share what is pinned, where it is long enough.
SHARING = ("splitting.context_limit=256", "sft.together=3", "sft.shared_prefix=auto")


def start(command: list[str], devices: int, index: int = 0) -> subprocess.Popen[str]:
    flags = simulated.devices(devices)
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | environment | {"COLUMNS": "160"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    said = [process.communicate() for process in processes]
    return [(p.returncode, *both) for p, both in zip(processes, said, strict=True)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def klong_sft(*settings: str, processes: int = 1, devices: int) -> list[subprocess.Popen[str]]:
    """Starts the command in each process."""
    command = ["-m", "klong_jax.cli", "sft", *SETTINGS, *settings]
    if processes == 1:
        return [start(command, devices)]
    together = [f"processes.coordinator=127.0.0.1:{free_port()}", f"processes.count={processes}"]
    return [
        start([*command, *together, f"processes.index={index}"], devices)
        for index in range(processes)
    ]


def rows(root: Path, stage: str = "sft") -> list[dict[str, Any]]:
    path = root / "run" / stage / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """Every number of every step, but for what the clock says and how full the rows were."""
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for left, right in zip(one, other, strict=True):
        for name in left.keys() - {"phase", "padding_share"} - CLOCKED:
            assert left[name] == pytest.approx(right[name], rel=TOLERANCE, abs=1e-6), name


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return demonstrations(tmp_path / "demonstrations.jsonl", ["You build things."] * 4)


def demonstrations(path: Path, systems: list[str]) -> Path:
    with path.open("w") as lines:
        for task, system in enumerate(systems):
            messages = [{"role": "system", "content": system}]
            for turn in range(7):
                messages.append({"role": "user", "content": f"add {task} and {turn}"})
                messages.append({"role": "assistant", "content": f"the sum is {task + turn}"})
            lines.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.mark.slow
def test_sft_is_the_same_on_every_mesh_and_resumes_a_killed_run_on_any(
    tmp_path: Path, data: Path
) -> None:
    roots = {name: tmp_path / name for name in ("alone", "killed", "moved")}
    given = {name: (f"data.path={data}", f"run.root={root}") for name, root in roots.items()}
    ((code, _, err),) = finish(klong_sft(*given["alone"], devices=1))
    assert code == 0, err

    running = klong_sft(*given["killed"], "mesh.context=2", processes=2, devices=4)
    while len(rows(roots["killed"])) <= SAVE_EVERY and running[0].poll() is None:
        time.sleep(0.02)
    for process in running:
        process.send_signal(signal.SIGKILL)
    assert [code for code, _, _ in finish(running)] == [-signal.SIGKILL] * 2
    assert SAVE_EVERY < len(rows(roots["killed"])) < STEPS
    shutil.copytree(roots["killed"], roots["moved"])

    # The same command resumes, and so does one on another mesh, in one process.
    resumed = klong_sft(*given["killed"], "mesh.context=2", processes=2, devices=4)
    (code, out, err), (other_code, other_out, other_err) = finish(resumed)
    assert (code, other_code) == (0, 0), err + other_err
    assert "policy in" in out
    assert "policy in" not in other_out, "only the first process talks"
    ((code, _, err),) = finish(
        klong_sft(*given["moved"], "mesh.data=2", "mesh.tensor=2", devices=8)
    )
    assert code == 0, err
    for name in ("killed", "moved"):
        same(rows(roots[name]), rows(roots["alone"]))


def until_under_way(root: Path, running: subprocess.Popen[str], steps: int = 3) -> None:
    while len(rows(root)) < steps and running.poll() is None:
        time.sleep(0.005)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_resumes_bit_for_bit(tmp_path: Path) -> None:
    data = demonstrations(tmp_path / "long.jsonl", ["You build things well. " * 30] * 4)
    roots = {name: tmp_path / name for name in ("stopped", "alone")}
    given = {
        name: (f"data.path={data}", f"run.root={root}", *SHORT, *SHARING, "sft.steps=48")
        for name, root in roots.items()
    }
    (stopped,) = klong_sft(*given["stopped"], devices=1)
    until_under_way(roots["stopped"], stopped)
    stopped.send_signal(signal.SIGTERM)
    ((code, _, err),) = finish([stopped])
    assert (code, err) == (
        143,
        "stopped by SIGTERM and saved; run the same command again to resume\n",
    )
    done = len(rows(roots["stopped"]))
    assert 3 <= done < 40
    checkpoints = roots["stopped"] / "run" / "sft" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == [str(done)]

    # And killed at some later moment, between two checkpoints.
    (killed,) = klong_sft(*given["stopped"], devices=1)
    until_under_way(roots["stopped"], killed, done + 1 + time.time_ns() % 4)
    killed.send_signal(signal.SIGKILL)
    ((code, out, _),) = finish([killed])
    assert code == -signal.SIGKILL
    assert [path.name for path in checkpoints.iterdir()] == [str(done)]
    assert re.search(r"(\d+) of \1 groups of windows compute 128 tokens", out)

    # What is compiled already need not be compiled for the run that nothing stops.
    shutil.copytree(roots["stopped"] / "run" / "compiled", roots["alone"] / "run" / "compiled")
    for code, _, err in finish([klong_sft(*one, devices=1)[0] for one in given.values()]):
        assert code == 0, err
    one, other = (
        [{name: row[name] for name in row.keys() - CLOCKED} for row in rows(root)]
        for root in roots.values()
    )
    assert one == other

    folder = roots["stopped"] / "run" / "sft"
    earlier, last = (load_policy(path) for path in (folder / "checkpoints" / str(done), folder))
    assert not np.array_equal(*(jax.tree.leaves(policy.params)[0] for policy in (earlier, last)))
    with pytest.raises(UserError, match=rf"holds no checkpoint 1; choose one of {done}, 48\.$"):
        load_policy(folder / "checkpoints" / "1")


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_after_the_same_step(tmp_path: Path, data: Path) -> None:
    given = (
        f"data.path={data}",
        f"data.heldout={data}",
        f"run.root={tmp_path}",
        *SHORT,
        "sft.steps=2000",
        "sft.save_every=3",
    )
    running = klong_sft(*given, processes=2, devices=1)
    until_under_way(tmp_path, running[0])
    running[1].send_signal(signal.SIGTERM)
    for code, _, err in finish(running):
        assert code == 143, err
    checkpoints = tmp_path / "run" / "sft" / "checkpoints"
    assert max(int(path.name) for path in checkpoints.iterdir()) == len(rows(tmp_path))
    judged = [row for row in rows(tmp_path) if row["step"] % 3 == 0]
    assert judged and all(row["heldout_loss_from_64"] > 0 for row in judged)


def test_a_mesh_that_does_not_fit_is_one_sentence(tmp_path: Path, data: Path) -> None:
    given = (f"data.path={data}", f"run.root={tmp_path}")
    for mesh, said in (
        ("mesh.tensor=3", "mesh: mesh.fsdp=0 cannot take what mesh.tensor=3 leaves of 8 devices"),
        ("mesh.fsdp=4", "mesh: fsdp 4 takes 4 devices, but there are 8"),
        ("mesh.data=3", "mesh.data=3"),
    ):
        ((code, _, err),) = finish(klong_sft(*given, mesh, devices=8))
        assert (code, err.count("\n")) == (2, 1), err
        assert said in err


def test_what_one_process_lacks_ends_both_in_one_sentence(tmp_path: Path, data: Path) -> None:
    together = [f"processes.coordinator=127.0.0.1:{free_port()}", "processes.count=2"]
    command = ["-m", "klong_jax.cli", "sft", *SETTINGS, *together, f"run.root={tmp_path}"]
    given = (f"data.path={data}", "data.path=/nowhere")
    running = [
        start([*command, path, f"processes.index={index}"], 1) for index, path in enumerate(given)
    ]
    for code, _, err in finish(running):
        assert code == 2, err
        assert "klong sft: /nowhere: cannot be read (No such file" in err
    assert not rows(tmp_path)


@pytest.mark.slow
def test_rl_is_the_same_on_every_mesh_and_in_two_processes(tmp_path: Path) -> None:
    worker = [str(RL_WORKER), str(tmp_path)]
    meshes = [json.dumps(mesh) for mesh in ({}, {"fsdp": 4, "tensor": 2})]
    ((code, _, err),) = finish([start([*worker, *meshes], 8)])
    assert code == 0, err
    coordinator = f"127.0.0.1:{free_port()}"
    # What is more, the two compute the prefix of a rollout's windows once.
    once = json.dumps({"fsdp": 4, "tensor": 2, "shared": 4})
    both = [start([*worker, "--process", coordinator, str(index), once], 4) for index in range(2)]
    for code, _, err in finish(both):
        assert code == 0, err
    alone, sharded, spread = (
        rows(tmp_path / name, "rl") for name in ("1-devices", "8-devices", "2-processes")
    )
    assert [row["windows"] > 0 for row in alone] == [True] * 3
    assert all(row["grad_norm"] > 0 for row in alone)
    assert alone[-1]["kl"] > 0, "the policy moved away from its reference"
    same(sharded, alone)
    same(spread, alone)
