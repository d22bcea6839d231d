"""Sandboxes made ahead, so that a caller waits for a claim and not for a creation.

What was asked for lately will be asked for again: for each such kind of sandbox some wait, made
in the background one after another. Environment, labels, lifetime, idle time and snapshot are no
part of a kind, for they are given at the claim.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sandbox.api import SandboxInfo, to_json
from sandbox.backends.base import Backend
from sandbox.backends.box import Box
from sandbox.errors import SandboxError
from sandbox.spec import SandboxSpec, new_id

log = logging.getLogger("sandbox")

_PAUSE_S = 0.05


@dataclass(eq=False)
class _Kind:
    """Sandboxes that differ in nothing but their names, oldest first, and when each is retired."""

    spec: SandboxSpec
    waiting: deque[tuple[Box, asyncio.TimerHandle]] = field(default_factory=deque)


class Pool:
    """The waiting sandboxes of a service."""

    def __init__(
        self, backend: Backend, *, size: int, idle_s: float, on_idle: Callable[[str], None]
    ) -> None:
        """Makes an empty pool over a started backend.

        Args:
            backend: What makes them.
            size: Sandboxes that wait at most, shared evenly by the kinds asked for last; 0 is
                no pool.
            idle_s: Seconds that one waits before it is removed; its kind is made again when it
                is asked for again.
            on_idle: Called with "idle" for each that has waited so long.
        """
        self._backend, self._size, self._idle_s = backend, size, idle_s
        self._on_idle = on_idle
        # Asked for last comes last.
        self._kinds: dict[str, _Kind] = {}
        self._refill: asyncio.Task[None] | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._shut = False

    @property
    def waiting(self) -> list[Box]:
        """The sandboxes that wait."""
        return [box for kind in self._kinds.values() for box, _ in kind.waiting]

    async def claim(self, info: SandboxInfo) -> Box | None:
        """A waiting sandbox that becomes the one described; None if there is none of its kind."""
        kind = self._kinds.get(self._key(info.spec))
        while kind is not None and kind.waiting:
            box, retirement = kind.waiting.popleft()
            retirement.cancel()
            try:
                self._backend.store.assign(box.info.id, info)
                await box.assign(info)
            except SandboxError as error:
                log.warning("a waiting sandbox was lost: %s", error)
                self._retire(box)
            else:
                return box
        return None

    def want(self, spec: SandboxSpec) -> None:
        """Notes that a sandbox was asked for, and sees that the next of its kind will wait."""
        if self._size == 0 or self._shut:
            return
        key = self._key(spec)
        known = self._kinds.pop(key) if key in self._kinds else None
        self._kinds[key] = known or _Kind(self._without_owner(spec))
        while len(self._kinds) > self._size:
            self._drop(next(iter(self._kinds.values())))
        for kind in self._kinds.values():
            self._shrink(kind, self._share)
        if self._refill is None:
            self._refill = asyncio.get_running_loop().create_task(self._fill())

    async def close(self) -> None:
        """Removes what waits; nothing waits from now on."""
        self._shut = True
        for kind in list(self._kinds.values()):
            self._drop(kind)
        if self._refill is not None:
            # A creation under way in a thread cannot be stopped.
            await self._refill
        await asyncio.gather(*self._retiring)

    @property
    def _share(self) -> int:
        return self._size // len(self._kinds)

    def _without_owner(self, spec: SandboxSpec) -> SandboxSpec:
        return dataclasses.replace(
            spec, env={}, labels={}, lifetime_s=self._idle_s, idle_s=None, snapshot=None
        )

    def _key(self, spec: SandboxSpec) -> str:
        return json.dumps(to_json(self._without_owner(spec)))

    async def _fill(self) -> None:
        try:
            # After the first command of whoever has just come.
            await asyncio.sleep(_PAUSE_S)
            while kind := self._lacking():
                await self._add(kind)
        finally:
            self._refill = None

    async def _add(self, kind: _Kind) -> None:
        try:
            box = await self._make(kind.spec)
        except (SandboxError, OSError) as error:
            # Whoever asks for one will hear it; until then there is no use in trying.
            log.warning("a sandbox that should wait cannot be made: %s", error)
            self._drop(kind)
            return
        if kind not in self._kinds.values():
            self._retire(box)
            return
        loop = asyncio.get_running_loop()
        kind.waiting.append((box, loop.call_later(self._idle_s, self._idle, kind)))

    def _lacking(self) -> _Kind | None:
        """The kind asked for last of those with too few that wait."""
        for kind in reversed(self._kinds.values()):
            if len(kind.waiting) < self._share:
                return kind
        return None

    async def _make(self, spec: SandboxSpec) -> Box:
        now = time.time()
        info = SandboxInfo(
            id=new_id(),
            backend=self._backend.name,
            isolation=self._backend.isolation,
            created_at=now,
            expires_at=now + spec.lifetime_s,
            spec=spec,
        )
        self._backend.store.expect(info.id)
        try:
            return await self._backend.create(info)
        except BaseException:
            self._backend.store.forget(info.id)
            raise

    def _idle(self, kind: _Kind) -> None:
        """The oldest of a kind has waited long enough."""
        self._on_idle("idle")
        self._shrink(kind, len(kind.waiting) - 1)
        if not kind.waiting:
            self._drop(kind)

    def _drop(self, kind: _Kind) -> None:
        self._shrink(kind, 0)
        self._kinds = {key: other for key, other in self._kinds.items() if other is not kind}

    def _shrink(self, kind: _Kind, size: int) -> None:
        while len(kind.waiting) > size:
            box, retirement = kind.waiting.popleft()
            retirement.cancel()
            self._retire(box)

    def _retire(self, box: Box) -> None:
        task = asyncio.get_running_loop().create_task(self._remove(box))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _remove(self, box: Box) -> None:
        try:
            await box.close()
        except (SandboxError, OSError):
            log.exception("waiting sandbox %s could not be removed wholly", box.info.id)
