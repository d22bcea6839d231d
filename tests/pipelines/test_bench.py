"""What is timed beside each other gives the same; the command prints it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from klong_jax.kernels.cases import CASES
from klong_jax.models.config import DTypes
from klong_jax.pipelines.bench_sft import ours, transformers_torch
from klong_jax.pipelines.bench_sft.job import Job, Outcome, Work
from klong_jax.pipelines.bench_sft.run import Bench, sizes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("what", CASES)
def test_peers_give_what_ours_gives(what: str) -> None:
    # The last case of those with the same peers.
    for peers, case in {tuple(case.peers): case for case in CASES[what]()}.items():
        assert peers
        ours = jax.tree.leaves(jax.jit(case.ours.function)(*case.ours.arguments))
        for work in case.peers.values():
            theirs = jax.tree.leaves(jax.jit(work.function)(*work.arguments))
            for one, other in zip(ours, theirs, strict=True):
                scale = float(np.abs(other).max())
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * scale)


def klong(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "klong_jax.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command_prints_a_row_a_case() -> None:
    done = klong("bench", "what=linear_cross_entropy", "repeats=1")
    assert done.returncode == 0, done.stderr
    assert "1024 x 128 x 4096, both" in done.stdout and "all logits" in done.stdout


def test_training_steps_are_timed_whole_and_with_the_prefix_once() -> None:
    done = klong("bench", "what=sft", "table=growth", "repeats=1")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "3"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:3])


def test_contenders_learn_the_same() -> None:
    small = sizes("cpu").model
    work = Work(16, 48, 2)

    def losses(contend: Callable[[Job], Outcome], *ways: dict[str, object]) -> list[float]:
        return [contend(Job(small, work, way, 1, DTypes())).loss for way in ways]

    one = {"remat": "none", "scan_layers": False}
    whole, once = losses(ours.contend, {**one, "shared": False}, {**one, "shared": True})
    assert whole == pytest.approx(once, rel=1e-5)
    # Weights are drawn by each itself: both know nothing of uniform tokens.
    (theirs,) = losses(transformers_torch.contend, {"checkpointing": False, "compile": False})
    assert abs(theirs - whole) < 0.2 and abs(theirs - np.log(small.vocab_size)) < 0.2


def test_a_contender_that_fails_is_said_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bench = Bench(sizes("cpu"), 1)
    assert bench.fastest("limit", Work(0, -1), [{}], 1.0) is None
    assert "Error" in capsys.readouterr().out


def test_an_unknown_backend_is_named() -> None:
    done = klong("bench", "what=attention", "backend=cuda")
    assert done.returncode == 2
    assert "kernel attention: there is no backend 'cuda'" in done.stderr
