"""What could not be removed is tried again: a host short of something has it again later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from sandbox.errors import SandboxError

log = logging.getLogger("sandbox")

_PAUSE_S = 2.0

_FAULTS = (OSError, RuntimeError, SandboxError)

Removal = Callable[[], Awaitable[None]]


class Removals:
    """The removals of a backend's sandboxes; each may be done twice without harm."""

    def __init__(self) -> None:
        """Begins with none."""
        self._failed: list[Removal] = []
        self._task: asyncio.Task[None] | None = None

    async def run(self, removal: Removal) -> None:
        """Removes a sandbox; what fails is raised, and tried again in the background."""
        try:
            await removal()
        except _FAULTS:
            self._failed.append(removal)
            if self._task is None:
                self._task = asyncio.get_running_loop().create_task(self._repeat())
            raise

    async def close(self) -> None:
        """Tries once more what has failed, and then no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            await self._try_all()

    async def _repeat(self) -> None:
        while self._failed:
            await asyncio.sleep(_PAUSE_S)
            await self._try_all()
        self._task = None

    async def _try_all(self) -> None:
        for removal in list(self._failed):
            try:
                await removal()
            except _FAULTS as error:
                log.warning("a sandbox cannot be removed yet: %s", error)
            else:
                self._failed.remove(removal)
