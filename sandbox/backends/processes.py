"""Finds and kills what a command left running when no process namespace does it.

Every command carries a marker in its environment and leads its own session. A member is a
process with the marker or in the session, or below one in the tree; a sandbox with a user of
its own also owns every process of that user. A process that clears its environment, starts a
session and outlives its parents escapes where there is no such user: isolation is "none" there.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass

from sandbox.errors import SandboxError

_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Members:
    """Which processes belong together.

    Attributes:
        marker: `NAME=value` in their environment.
        session: Session that they are in, or None.
        uid: User whose every process belongs, or None.
    """

    marker: bytes
    session: int | None = None
    uid: int | None = None

    def find(self) -> set[int]:
        """The ids of live members now."""
        parents: dict[int, int] = {}
        members: set[int] = set()
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            pid = int(entry.name)
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
                if fields[0] in (b"Z", b"X"):
                    continue
                parents[pid] = int(fields[1])
                if self._owns(pid, session=int(fields[3])):
                    members.add(pid)
        while below := {pid for pid, up in parents.items() if up in members} - members:
            members |= below
        return members - {os.getpid()}

    def _owns(self, pid: int, *, session: int) -> bool:
        if session == self.session:
            return True
        uid = os.stat(f"/proc/{pid}").st_uid
        if self.uid is not None:
            # A process that may not be dumped shows as root's; its marker tells.
            if uid == self.uid:
                return True
            if uid != 0:
                return False
        return self.marker in _read(f"/proc/{pid}/environ").split(b"\0")


async def kill_all(members: Members) -> None:
    """Kills members until none is left, however fast they fork.

    Raises:
        SandboxError: some are still there after five seconds.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while found := await asyncio.to_thread(members.find):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise SandboxError(f"{len(found)} processes of the sandbox survive being killed.")
        await asyncio.sleep(0.002)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
