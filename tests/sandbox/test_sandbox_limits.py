"""Limits that the other tests do not meet, and what their absence is answered with."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sandbox_helpers import Service, in_box, require, wait_until

from sandbox.client import Limits, Sandbox, SandboxClient, SandboxGone, SandboxRefused, SandboxSpec
from sandbox.service import embedded

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a disk")
def test_a_disk_ends_where_its_quota_does_and_goes_with_its_sandbox(service: Service) -> None:
    fill = "for n in 1 2 3; do head -c 9000000 /dev/zero >{0}/$n || break; done; echo $n"

    async def body(box: Sandbox) -> None:
        full = await box.exec(fill.format('"$TMPDIR"'))
        assert full.stdout == "3\n" and "No space left" in full.stderr
        with pytest.raises(SandboxRefused, match="disk is full"):
            await box.write("x", b"x" * 3_000_000)
        assert (await box.exec('rm "$TMPDIR"/*; echo x >x; ls; touch ~/y')).stdout == "x\n"
        (data,) = service.state_dir.glob(f"*/*/{box.id}/data")
        assert os.path.ismount(data)
        held = (data.parent / "disk").stat().st_blocks * 512
        assert held < 25_000_000, "the host holds more than the quota"
        await box.close()
        assert not data.exists()
        assert box.id not in Path("/proc/mounts").read_text()

        def device_gone() -> bool:
            return box.id not in subprocess.check_output(["losetup", "-a"], text=True)

        assert await asyncio.to_thread(wait_until, device_gone)

    in_box(service.url, body, SandboxSpec(limits=Limits(disk_mb=20, inodes=500)))


def test_a_quota_that_cannot_be_had_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(box: Sandbox) -> None:
        async with SandboxClient(service.url) as client:
            with pytest.raises(SandboxRefused, match=r"^limits.inodes: needs limits.disk_mb"):
                await client.create(SandboxSpec(limits=Limits(inodes=500)))
            monkeypatch.setattr(os, "geteuid", lambda: 54321)
            with pytest.raises(SandboxRefused, match=r"^limits.disk_mb: .* root"):
                await client.create(SandboxSpec(limits=Limits(disk_mb=20)))
            assert "not limited" in (await client.health())["disk"]
            monkeypatch.undo()

    in_box(service.url, body)


def test_open_files_are_limited(service: Service) -> None:
    program = (
        "import os\ntry:\n while 1: last = os.dup(1)\nexcept OSError as e: print(last, e.errno)"
    )

    async def body(box: Sandbox) -> None:
        assert (await box.exec("python3 -", stdin=program)).stdout == "99 24\n"

    in_box(service.url, body, SandboxSpec(limits=Limits(open_files=100)))


def test_an_idle_sandbox_is_removed_and_a_busy_one_is_not(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        assert (await box.exec("sleep 2; echo busy")).stdout == "busy\n"
        for _ in range(3):
            await asyncio.sleep(0.6)
            await box.write("x", "")
        await asyncio.sleep(2)
        with pytest.raises(SandboxGone, match="expired"):
            await box.exec("true")
        gone = lambda: not list(service.state_dir.glob(f"*/*/{box.id}"))  # noqa: E731
        assert await asyncio.to_thread(wait_until, gone)

    in_box(service.url, body, SandboxSpec(idle_s=1.5))


def test_commands_and_sessions_hear_how_many_threads_suit_them(service: Service) -> None:
    ask = "echo $OMP_NUM_THREADS $NUMBA_NUM_THREADS"

    async def body(box: Sandbox) -> None:
        assert (await box.exec(ask)).stdout == "2 9\n"
        async with await box.session() as session:
            assert (await session.run(ask)).stdout == "2 9\n"

    # What the caller says goes first.
    spec = SandboxSpec(limits=Limits(cpus=1.5), env={"NUMBA_NUM_THREADS": "9"})
    in_box(service.url, body, spec)


_MAKE = """
import asyncio, sys
from pathlib import Path
from sandbox.client import Limits, SandboxClient, SandboxSpec
from sandbox.service import embedded

async def make(url):
    async with SandboxClient(url) as client:
        await client.create(SandboxSpec(limits=Limits(disk_mb=20)))
    print("made", flush=True)
    await asyncio.sleep(60)

with embedded("local", isolation="bubblewrap", state_dir=Path(sys.argv[1])) as url:
    asyncio.run(make(url))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a disk")
def test_the_disk_of_a_killed_service_is_taken_away_by_the_next(state_dir: Path) -> None:
    require("local-bubblewrap")
    command = [sys.executable, "-c", _MAKE, str(state_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "made\n"
        first.kill()
    assert str(state_dir) in Path("/proc/mounts").read_text()
    with embedded("local", isolation="bubblewrap", state_dir=state_dir):
        assert str(state_dir) not in Path("/proc/mounts").read_text()
        assert not list(state_dir.glob("*/*/sb-*"))
