"""What dead services left: adopted by a durable service where it lives, else reaped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from sandbox import owner
from sandbox.backends.box import Box
from sandbox.errors import SandboxError
from sandbox.store import Store
from sandbox.workspace import remove_tree

log = logging.getLogger("sandbox")


@dataclass
class Inheritance:
    """What a service took over.

    Attributes:
        boxes: Living sandboxes.
        directories: The directories of dead services that those are in.
        reaped: How many others were ended, or had ended and were cleared away.
    """

    boxes: list[Box] = field(default_factory=list)
    directories: list[Path] = field(default_factory=list)
    reaped: int = 0


async def inherit(
    state_dir: Path,
    store: Store,
    *,
    durable: bool,
    adopt: Callable[[Path, owner.Record], Awaitable[Box]],
    reap: Callable[[Path, owner.Record | None], Awaitable[None]],
    lives: Callable[[Path, owner.Record], bool] = lambda _, record: record.is_alive,
) -> Inheritance:
    """Visits every dead service of a state directory.

    The living sandboxes of dead durable services wait for the next durable one; other services
    leave them alone, and reap what has died meanwhile. What waited for a caller is reaped, too.

    Args:
        state_dir: Where services have their directories.
        store: Where their records are.
        durable: Whether the service that asks is.
        adopt: Attaches to a living sandbox; a `SandboxError` says that it cannot be had.
        reap: Ends a sandbox and removes its directory.
        lives: Whether a sandbox still runs; by default, whether its process does.
    """
    found = Inheritance()

    async def end(directory: Path, record: owner.Record | None) -> None:
        try:
            await reap(directory, record)
        except (OSError, RuntimeError, SandboxError) as error:
            # That one cannot be cleared away must not keep others from being served.
            log.warning("sandbox %s cannot be removed: %s", directory.name, error)
            return
        if record is not None:
            store.log(record.info.id, "close", why="orphaned")
        found.reaped += 1

    for dead in owner.abandoned(state_dir):
        kept = owner.is_durable(dead)
        try:
            own = owner.take_over(dead) if kept and durable else dead
        except FileNotFoundError:
            continue  # Another service that starts was faster.
        living = 0
        for directory in owner.box_directories(own):
            record = store.read(directory.name)
            unclaimed = store.is_waiting(directory.name)
            if not (kept and record is not None and lives(directory, record)) or unclaimed:
                log.info("reaping sandbox %s of a dead service", directory.name)
                await end(directory, record)
                continue
            living += 1
            if durable:
                try:
                    found.boxes.append(await adopt(directory, record))
                    log.info("adopted sandbox %s of a dead service", directory.name)
                except SandboxError as error:
                    log.warning("reaping sandbox %s, lost: %s", directory.name, error)
                    await end(directory, record)
        if living and durable:
            found.directories.append(own)
        elif not any(owner.box_directories(own)):
            await asyncio.to_thread(remove_tree, own)
    return found
