"""Control groups of a host: exact limits for everything that a sandbox runs together.

Version 2 where its controllers are free, else version 1, where this process may write them.
"""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from sandbox.backends.box import Freezer
from sandbox.errors import SandboxError, SandboxGone
from sandbox.spec import MB, Limits

ROOT = Path("/sys/fs/cgroup")
GROUP = "klong-sandbox"
PERIOD_US = 100_000
_FREEZE_S = 10.0


class Cgroups:
    """Makes and removes one group a sandbox."""

    def __init__(self, version: Literal[1, 2]) -> None:
        """Uses a version that `detect` found."""
        self.version = version
        self._parents = (
            [ROOT / GROUP]
            if version == 2
            else [ROOT / controller / GROUP for controller in ("memory", "pids", "cpu")]
        )
        freezing = ROOT / ("" if version == 2 else "freezer") / GROUP
        # The one group that can be frozen; version 1 need not have it.
        self._freezing = freezing if os.access(freezing, os.W_OK) else None
        if version == 1 and self._freezing is not None:
            self._parents.append(self._freezing)

    def freezer(self, sandbox_id: str) -> Freezer | None:
        """What stops and resumes a sandbox's group; None where that cannot be done."""
        if self._freezing is None:
            return None
        group, first = self._freezing / sandbox_id, self.version == 1
        switch = group / ("freezer.state" if first else "cgroup.freeze")

        def is_frozen() -> bool:
            if first:
                return switch.read_text().strip() == "FROZEN"
            return "frozen 1" in (group / "cgroup.events").read_text()

        async def freeze() -> None:
            try:
                switch.write_text("FROZEN" if first else "1")
                # A process that waits for a disk stands still only after that.
                async with asyncio.timeout(_FREEZE_S):
                    while not is_frozen():
                        await asyncio.sleep(0.001)
            except FileNotFoundError:
                raise SandboxGone("the sandbox's control group is gone.") from None
            except TimeoutError:
                raise SandboxError(
                    f"the sandbox does not stand still within {_FREEZE_S:g} seconds."
                ) from None

        async def thaw() -> None:
            with suppress(FileNotFoundError):
                switch.write_text("THAWED" if first else "0")

        return Freezer(freeze, thaw)

    def create(self, sandbox_id: str, limits: Limits) -> list[Path]:
        """Makes a sandbox's group; a process joins it by writing 0 into each returned file."""
        memory = str(limits.memory_mb * MB)
        quota = int(limits.cpus * PERIOD_US)
        settings = (
            {
                "memory.max": memory,
                "memory.swap.max": "0",
                "pids.max": str(limits.pids),
                "cpu.max": f"{quota} {PERIOD_US}",
            }
            if self.version == 2
            else {
                # Where swap is not counted, it is not used.
                "memory.swappiness": "0",
                "memory.limit_in_bytes": memory,
                "memory.memsw.limit_in_bytes": memory,
                "pids.max": str(limits.pids),
                "cpu.cfs_period_us": str(PERIOD_US),
                "cpu.cfs_quota_us": str(quota),
            }
        )
        for directory in self._directories(sandbox_id):
            directory.mkdir()
            for name, value in settings.items():
                # A hierarchy of version 1 has only its own files; swap accounting may be off.
                if (directory / name).exists():
                    (directory / name).write_text(value)
        return [directory / "cgroup.procs" for directory in self._directories(sandbox_id)]

    async def remove(self, sandbox_id: str) -> None:
        """Removes a sandbox's group, whose processes were killed; waits until they are reaped."""
        for directory in self._directories(sandbox_id):
            for pause in (0.001, 0.01, 0.05, 0.2, 0.5, 1.0, None):
                try:
                    directory.rmdir()
                except FileNotFoundError:
                    pass
                except OSError as error:
                    if error.errno != errno.EBUSY or pause is None:
                        raise
                    await asyncio.sleep(pause)
                    continue
                break

    def _directories(self, sandbox_id: str) -> list[Path]:
        return [parent / sandbox_id for parent in self._parents]


def detect() -> Cgroups | None:
    """The control groups that this process may use, or None."""
    with suppress(OSError):
        available = (ROOT / "cgroup.controllers").read_text().split()
        if {"memory", "pids", "cpu"} <= set(available):
            (ROOT / GROUP).mkdir(exist_ok=True)
            for parent in (ROOT, ROOT / GROUP):
                (parent / "cgroup.subtree_control").write_text("+memory +pids +cpu")
            return Cgroups(2)
    with suppress(OSError):
        for controller in ("memory", "pids", "cpu"):
            if not (ROOT / controller / "cgroup.procs").exists():
                return None
            (ROOT / controller / GROUP).mkdir(exist_ok=True)
            # There already, perhaps made by root.
            if not os.access(ROOT / controller / GROUP, os.W_OK):
                return None
        if (ROOT / "freezer/cgroup.procs").exists():
            with suppress(PermissionError):
                (ROOT / "freezer" / GROUP).mkdir(exist_ok=True)
        return Cgroups(1)
    return None
