"""Snapshots of living sandboxes, and sandboxes that begin with one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from sandbox.api import SnapshotInfo
from sandbox.backends.base import Backend
from sandbox.backends.box import Box
from sandbox.errors import SandboxError, SandboxGone, SandboxRefused, SandboxTooLarge
from sandbox.look import Look
from sandbox.metrics import Metrics
from sandbox.snapshots import Snapshots, Stopped
from sandbox.spec import MB, SandboxSpec

# Snapshots taken and restored at once: each keeps a core busy.
_AT_ONCE = 2


class Checkpoints:
    """Between a backend's sandboxes and the snapshots beside its store."""

    def __init__(self, backend: Backend, metrics: Metrics, *, record: Callable[..., None]) -> None:
        """Wraps a backend that is not started yet; `record` logs what was done to a sandbox."""
        self._backend, self._metrics, self._record = backend, metrics, record
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def start(self) -> None:
        """Opens the snapshots of a started backend, and removes what killed services left."""
        self.stored = Snapshots(self._backend.store.path.parent / "snapshots")
        await asyncio.to_thread(self.stored.recover)

    async def check(self, spec: SandboxSpec) -> None:
        """Refuses a spec whose snapshot is not there or cannot fit, before anything is made.

        Raises:
            SandboxSnapshotMissing: it is not there.
            SandboxTooLarge: the spec's disk is too small for it.
        """
        if spec.snapshot is None:
            return
        info = await asyncio.to_thread(self.stored.info, spec.snapshot)
        disk_mb = spec.limits.disk_mb
        if disk_mb is not None and info.bytes > disk_mb * MB:
            raise SandboxTooLarge(
                f"limits.disk_mb: {disk_mb} is too little for the {info.bytes} bytes of the "
                "snapshot; raise it."
            )

    async def take(self, box: Box, look: Look | None) -> SnapshotInfo:
        """Keeps the files and sessions of a sandbox, frozen meanwhile if it can be.

        Being cancelled ends it; nothing of it is seen then.

        Args:
            box: The sandbox.
            look: What runs in it, if it is paused; else it is asked.
        """
        sandbox_id = box.info.id
        if box.tree is None:
            raise SandboxRefused("snapshot: this backend has no access to the files of a sandbox.")
        began = time.monotonic()
        stop = threading.Event()
        async with self._turns:
            work = asyncio.ensure_future(self._take(box, look, stop))
            try:
                info = await asyncio.shield(work)
            except asyncio.CancelledError:
                stop.set()
                await asyncio.wait([work])
                work.exception()  # Seen, if not by its caller.
                raise
        seconds = time.monotonic() - began
        self._metrics.snapshots.labels("take").observe(seconds)
        facts = {"digest": info.digest, "files": info.files, "bytes": info.bytes}
        self._record(sandbox_id, "snapshot", **facts, seconds=round(seconds, 6))
        return info

    async def _take(self, box: Box, look: Look | None, stop: threading.Event) -> SnapshotInfo:
        assert box.tree is not None
        if look is None:
            look = await box.look()
        frozen = box.freezer is not None
        if frozen:
            await box.freeze()
        try:
            return await asyncio.to_thread(
                self.stored.take,
                box.tree.read(),
                look,
                sandbox=box.info.id,
                frozen=frozen,
                is_stopped=lambda: stop.is_set() or box.is_closed,
            )
        except (Stopped, OSError, SandboxError):
            if box.is_closed:
                raise SandboxGone(f"sandbox {box.info.id} was closed meanwhile.") from None
            raise
        finally:
            if frozen:
                await box.thaw()

    async def restore(self, box: Box) -> None:
        """Fills a fresh sandbox with the snapshot of its spec, if it names one, or closes it."""
        if box.info.spec.snapshot is None:
            return
        began = time.monotonic()
        try:
            await self._restore(box, box.info.spec.snapshot)
        except BaseException:
            with suppress(SandboxError, OSError):
                await asyncio.shield(box.close())
            raise
        self._metrics.snapshots.labels("restore").observe(time.monotonic() - began)

    async def _restore(self, box: Box, digest: str) -> None:
        if box.tree is None:
            raise SandboxRefused("snapshot: this backend has no access to the files of a sandbox.")
        store, sandbox_id = self._backend.store, box.info.id
        # Until it is whole, a service that comes after this one removes it.
        store.begin(sandbox_id)
        async with self._turns:
            shells = await asyncio.to_thread(self.stored.restore, digest, box.tree.fill)
        await asyncio.gather(*(box.replay(shell) for shell in shells))
        store.finish(sandbox_id)
        names = [shell.name for shell in shells]
        self._record(sandbox_id, "restore", digest=digest, sessions=names)
