"""A small storm of kills; tests/sandbox/storm.py by hand brings a large one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sandbox_helpers import require
from storm import Storm


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["local", pytest.param("docker", marks=pytest.mark.docker)])
def test_a_storm_of_kills_leaves_nothing_and_loses_no_result(backend: str, state_dir: Path) -> None:
    require("docker" if backend == "docker" else "local-bubblewrap")
    seed = int(os.environ.get("KLONG_KILL_SEED", "0"))
    outcome = Storm(
        state_dir, backend=backend, kills=15, sandboxes=8, seed=seed, gap_s=0.4, idle_s=10.0
    ).run()
    assert outcome.broken == [], outcome
    assert sum(outcome.kills.values()) == 15
    assert outcome.acknowledged > 15 and outcome.survivors > 0
