"""Sharded equals unsharded: whatever the mesh, a step has the same loss and gradients.

Devices are simulated on the CPU, in processes of their own because their number is fixed at start.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from simulated import devices

WORKER = Path(__file__).with_name("sharding_worker.py")
TOLERANCE = 1e-5

# Model, mesh, and tokens of a prefix that windows share, or that they are packed into rows; None
# trains single windows.
CASES: list[tuple[str, dict[str, int], int | str | None]] = [
    ("dense", {"data": 2, "fsdp": 4}, None),
    ("dense", {"fsdp": 4, "tensor": 2}, None),
    ("dense", {"context": 4, "fsdp": 2}, None),
    ("dense", {"data": 2, "fsdp": 2, "tensor": 2}, None),
    ("mixture", {"fsdp": 8}, None),
    ("mixture", {"expert": 4, "fsdp": 2}, None),
    ("dense", {"fsdp": 8}, 16),
    ("dense", {"data": 2, "context": 2, "tensor": 2}, 16),
    ("adapted", {"context": 2, "fsdp": 2, "tensor": 2}, 16),
    ("mixture", {"context": 4, "fsdp": 2}, 16),
    ("mixture", {"expert": 2, "context": 2, "tensor": 2}, 16),
    ("mixture", {"expert": 2, "context": 2, "tensor": 2}, "packed"),
]


def work(asked: dict[str, Any], processes: int = 1) -> list[list[dict[str, Any]]]:
    """What each process prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for index in range(processes):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": devices(8 // processes),
        }
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        command = [sys.executable, str(WORKER), json.dumps(asked)]
        running.append(
            subprocess.Popen(
                command,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    printed = []
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        printed.append([json.loads(line) for line in out.splitlines() if line.startswith("{")])
    return printed


Note = Callable[[str], None]


def show(rows: list[dict[str, Any]], measured: Note) -> None:
    """The table, whether or not the test passes; `off` is relative to a tensor's largest."""
    measured(
        f"{'model':8} {'mesh':32} {'shared':>6} {'processes':>9} {'loss':>10} {'alone':>10} "
        f"{'off':>8}"
    )
    for row in rows:
        measured(
            f"{row['model']:8} {row['mesh']:32} {row['shared'] or 0!s:>6} {row['processes']:9} "
            f"{row['loss']:10.5f} {row['alone']:10.5f} {row['off']:8.1e}"
        )


@pytest.mark.slow
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(
    measured: Note,
) -> None:
    (rows,) = work({"cases": CASES})
    show(rows, measured)
    assert len(rows) == len(CASES)
    for row in rows:
        assert row["loss"] == pytest.approx(row["alone"], rel=TOLERANCE), row["mesh"]
        assert row["off"] < TOLERANCE, row["mesh"]


@pytest.mark.slow
def test_two_processes_equal_one_and_each_restores_the_others_checkpoint(
    tmp_path: Path, measured: Note
) -> None:
    mesh = {"fsdp": 4, "context": 2}
    cases = [("mixture", mesh, 16)]
    folder = str(tmp_path / "checkpoints")
    first, second = work({"cases": cases, "save": [folder, mesh]}, processes=2)
    ((*ones, restored),) = work({"cases": cases, "restore": [folder, {"expert": 4, "tensor": 2}]})
    *twos, saved = first
    show([*twos, *ones], measured)
    # Nothing depends on the process: both print the same.
    assert first == second
    for two, one in zip(twos, ones, strict=True):
        assert two["processes"] == 2
        assert two["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
        assert two["norms"] == pytest.approx(one["norms"], rel=TOLERANCE)
        assert two["off"] < TOLERANCE
    assert restored["digest"] == saved["digest"]
    assert restored["position"] == 7
    assert restored["in_place"]
