"""Sandboxes are measured whole, and ratios say what they should."""

import asyncio
import os
import shutil

import pytest

from klong_jax.pipelines.bench_sandbox.run import (
    MEASURES,
    Ours,
    measure,
    measure_claim,
    service,
    table,
)


@pytest.mark.skipif(
    shutil.which("bwrap") is None and os.environ.get("CI") != "true",
    reason="bubblewrap is not installed",
)
def test_sandboxes_are_measured_whole() -> None:
    async def main() -> tuple[dict[str, float], float]:
        async with service("bubblewrap", pool=1) as client:
            ours = Ours("bubblewrap", client)
            measured = await measure(ours, 1, count=2, seconds=0.1)
            return measured, await measure_claim(client, 1)

    measured, claim = asyncio.run(main())
    assert set(measured) == set(MEASURES) - {"claim"}
    assert all(value > 0 for value in [*measured.values(), claim])
    assert 1 < measured["memory"] < 100


def test_ratios_say_how_much_better_ours_is() -> None:
    ours = {"exec": 2.0, "rate": 100.0}
    peer = {"exec": 30.0, "rate": 50.0, "write": 1.0}
    rows = table({"limit": {}, "docker": ours, "SWE-ReX": peer})
    assert rows[0].endswith("docker / SWE-ReX")
    cells = {row.split()[0]: row.split() for row in rows[1:]}
    assert cells["exec,"][-5:] == ["-", "2", "30", "15.0", "x"]
    assert cells["commands"][-4:] == ["100", "50", "2.0", "x"]
    assert cells["write"][-3:] == ["-", "1", "-"]
