"""What is timed beside each other gives the same; the command prints it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from klong_jax.kernels.cases import CASES

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
    done = klong("bench", "what=sft", "repeats=1")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:3] for row in rows if len(row) == 11] == [["64", "192", "4"], ["128", "128", "4"]]
    assert [row[0] for row in rows if len(row) == 5] == ["1", "2", "4"]


def test_an_unknown_backend_is_named() -> None:
    done = klong("bench", "what=attention", "backend=cuda")
    assert done.returncode == 2
    assert "kernel attention: there is no backend 'cuda'" in done.stderr
