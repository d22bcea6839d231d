"""What one who runs a service does with it, as text for a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from subprocess import CalledProcessError
from typing import Any

from sandbox.api import Event, SandboxInfo
from sandbox.backends.kubernetes.options import Options
from sandbox.client import SandboxClient
from sandbox.doctor import findings
from sandbox.egress.install import install
from sandbox.errors import SandboxError
from sandbox.table import print_table, span

TIMED_OUT = 124
"""Exit status of a command that was killed at its time limit, as of coreutils' `timeout`."""

_HEADINGS = ("ID", "STATE", "AGE", "LEFT", "PROCESSES", "MEMORY", "IMAGE", "LABELS")


async def ps(client: SandboxClient) -> None:
    """Prints the living sandboxes of a service, oldest first."""
    infos, usage = await client.list(), await client.usage()
    now = time.time()
    # One made between the two answers has no usage yet; one closed between them is no more.
    rows = [_row(info, usage[info.id], now) for info in infos if info.id in usage]
    print_table([_HEADINGS, *rows])


def _row(info: SandboxInfo, used: dict[str, Any], now: float) -> tuple[str, ...]:
    return (
        info.id,
        used["state"],
        span(now - info.created_at),
        span(max(0.0, info.expires_at - now)),
        str(used["processes"]),
        f"{used['memory_bytes'] / 1e6:.1f} MB",
        info.spec.image or f"({info.isolation})",
        ",".join(f"{name}={value}" for name, value in info.spec.labels.items()),
    )


async def execute(client: SandboxClient, sandbox_id: str, command: str, *, timeout_s: float) -> int:
    """Runs a command in a sandbox, prints what it prints; returns its exit status.

    A command that is killed at its time limit has the status 124.
    """
    box = await client.attach(sandbox_id)
    result = await box.exec(command, timeout_s=timeout_s)
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    if result.timed_out:
        print(f"killed at its limit of {timeout_s:g} seconds", file=sys.stderr)
    return TIMED_OUT if result.exit_code is None else result.exit_code


async def logs(client: SandboxClient, sandbox_id: str) -> None:
    """Prints what was done to a sandbox and in it, also when it is no more."""
    after = 0
    while events := await client.log(sandbox_id, after=after):
        for event in events:
            print(describe(event))
        after = events[-1].number


async def remove(client: SandboxClient, sandbox_ids: Iterable[str]) -> None:
    """Removes sandboxes and prints their ids; one that is not there is an error."""
    for sandbox_id in sandbox_ids:
        await (await client.attach(sandbox_id)).close()
        print(sandbox_id)


def install_egress() -> None:
    """Installs the engine that lets sandboxes reach the network, and prints its interpreter.

    Raises:
        SandboxError: pip fails.
    """
    try:
        print(install())
    except (OSError, CalledProcessError) as error:
        raise SandboxError(f"the egress engine cannot be installed: {error}.") from None


async def snapshot(client: SandboxClient, sandbox_id: str) -> None:
    """Takes a snapshot of a sandbox; prints its digest, and what a restore does not bring back."""
    info = await (await client.attach(sandbox_id)).snapshot()
    print(info.digest)
    lost = [f"{info.lost_processes} processes"] if info.lost_processes else []
    lost += [f"{info.skipped} pipes, sockets or devices"] if info.skipped else []
    busy = [session.name for session in info.sessions if not session.whole]
    lost += [f"what the busy sessions {', '.join(busy)} have exported"] if busy else []
    if lost:
        print(f"not in it: {'; '.join(lost)}", file=sys.stderr)


async def pause(client: SandboxClient, sandbox_ids: Iterable[str]) -> None:
    """Pauses sandboxes and prints their ids."""
    for sandbox_id in sandbox_ids:
        await (await client.attach(sandbox_id)).pause()
        print(sandbox_id)


async def resume(client: SandboxClient, sandbox_ids: Iterable[str]) -> None:
    """Resumes sandboxes and prints their ids."""
    for sandbox_id in sandbox_ids:
        await (await client.attach(sandbox_id)).resume()
        print(sandbox_id)


async def snapshots(client: SandboxClient) -> None:
    """Prints the snapshots of a service, oldest first."""
    now = time.time()
    rows = [
        (
            info.digest,
            span(max(0.0, now - info.created_at)),
            str(info.files),
            f"{info.bytes / 1e6:.1f} MB",
            str(len(info.sessions)),
            info.sandbox,
        )
        for info in await client.snapshots()
    ]
    print_table([("DIGEST", "AGE", "FILES", "SIZE", "SESSIONS", "OF"), *rows])


async def drop(client: SandboxClient, digests: Iterable[str]) -> None:
    """Deletes snapshots and prints their digests; one that is not there is an error."""
    for digest in digests:
        await client.delete_snapshot(digest)
        print(digest)


def doctor(image: str, cluster: Options | None = None) -> None:
    """Prints what this host, and a cluster that it reaches, can do for sandboxes."""
    rows = [(one.name, one.found or "missing", one.allows) for one in findings(image, cluster)]
    print_table([("WHAT", "FOUND", "WHAT THAT MEANS"), *rows])


def describe(event: Event) -> str:
    """One line for an event: its time, its kind, its facts."""
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at))
    facts = " ".join(
        f"{name}={value!r}"
        for name, value in event.facts.items()
        # What is not said is as usual.
        if value not in (None, False, {}, ".")
    )
    return f"{clock}.{int(event.at % 1 * 1000):03d}  {event.kind:<8} {facts}".rstrip()
