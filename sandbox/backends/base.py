"""What a backend is, and what those of this host share."""

from __future__ import annotations

import asyncio
import compileall
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from sandbox.api import (
    SandboxInfo,
)
from sandbox.backends.box import LATE_S, Box, Freezer
from sandbox.dialled import DialledLink
from sandbox.errors import (
    SandboxError,
    SandboxLost,
    SandboxUnavailable,
)
from sandbox.files import HostFiles
from sandbox.look import MAX_BYTES as MAX_LOOK
from sandbox.spec import MB, Isolation, Limits, SandboxSpec
from sandbox.store import Store
from sandbox.tree import HostTree
from sandbox.workspace import remove_tree

log = logging.getLogger("sandbox")

# Where the agent's code and the service's socket are inside.
AGENT_DIR, LINE_DIR = "/run/klong/agent", "/run/klong/line"

# Where commands find the relay to the egress proxy, on the loopback of their sandbox.
RELAY_PORT = 3128

# Files, directories and links of a snapshot of a sandbox without `limits.inodes`.
_MAX_ENTRIES = 250_000


class Backend(Protocol):
    """A way to make sandboxes on this host."""

    @property
    def name(self) -> str:
        """The name that callers choose it by."""

    @property
    def isolation(self) -> Isolation:
        """What separates a sandbox from the host."""

    @property
    def store(self) -> Store:
        """What it remembers between services; open from `start` to `close`."""

    @property
    def reaped(self) -> int:
        """How many sandboxes of dead services `start` has ended."""

    async def start(self) -> list[Box]:
        """Checks that it can work here, and reaps or adopts what dead services left.

        Returns:
            The living sandboxes of dead services; none unless the backend is durable.

        Raises:
            SandboxUnavailable: it cannot work here; the message says what is missing.
        """

    async def create(self, info: SandboxInfo) -> Box:
        """Makes a sandbox and waits for its agent.

        Raises:
            SandboxRefused: the backend cannot give what the spec asks.
        """

    async def close(self) -> None:
        """Removes what the backend itself keeps, after its boxes are closed."""

    def health(self) -> dict[str, Any]:
        """Facts for the service's health answer."""


# What the agent imports of this package, beside its own; the last three only to move files.
_MODULES = ("__init__", "protocol", "output", "errors", "workspace", "archive")


def agent_code() -> dict[str, str]:
    """The agent's files, by path: the package as far as it needs it."""
    source = resources.files("sandbox")
    code = {f"sandbox/{name}.py": (source / f"{name}.py").read_text() for name in _MODULES}
    for file in (source / "agent").iterdir():
        if file.name.endswith(".py"):
            code[f"sandbox/agent/{file.name}"] = file.read_text()
    return code


def install_agent(directory: Path) -> None:
    """Copies the agent's code to where sandboxes can read it."""
    package = directory / "sandbox"
    (package / "agent").mkdir(parents=True)
    for path, text in agent_code().items():
        (directory / path).write_text(text)
    shutil.copyfile(package / "agent/__main__.py", directory / "__main__.py")
    # For interpreters of this version; others compile it at every start.
    compileall.compile_dir(directory, quiet=2)
    for parent, _, names in os.walk(directory):
        os.chmod(parent, 0o755)
        for name in names:
            os.chmod(f"{parent}/{name}", 0o644)


def agent_arguments(
    python: Sequence[str],
    line: str,
    info: SandboxInfo,
    *,
    durable: bool,
    patience_s: float = 0.0,
) -> list[str]:
    """The command line of the agent.

    Args:
        python: The interpreter and its program, the agent.
        line: Directory of the service's socket, as the agent sees it; none, and a bridge comes.
        info: The sandbox.
        durable: Whether it outlives its service.
        patience_s: Seconds that one which does not waits for a line that broke.
    """
    lifetime_s = info.spec.lifetime_s + LATE_S
    relay = [str(RELAY_PORT)] if info.spec.egress is not None else []
    return [*python, line, repr(lifetime_s), repr(lifetime_s if durable else patience_s), *relay]


def open_link(directory: Path, spec: SandboxSpec, owner: int | None) -> DialledLink:
    """The line to the agent of the sandbox with this directory."""
    max_payload = max(2 * spec.limits.output_bytes, MAX_LOOK)
    return DialledLink(directory / "line", owner=owner, max_payload=max_payload)


def open_tree(directory: Path, limits: Limits, owner: int | None) -> HostTree:
    """What a snapshot keeps of the sandbox with this directory."""
    return HostTree(
        {name: directory / "data" / name for name in ("home", "workspace")},
        owner=owner,
        max_bytes=max(limits.files_mb, limits.disk_mb or 0) * MB,
        max_entries=limits.inodes or _MAX_ENTRIES,
    )


def open_workspace(directory: Path, spec: SandboxSpec, owner: int | None) -> HostFiles:
    """The workspace of the sandbox with this directory."""
    return HostFiles(directory / "data/workspace", owner=owner, max_bytes=spec.limits.files_mb * MB)


def shm_bytes(limits: Limits) -> int:
    """The size of a sandbox's /dev/shm: full, it leaves its agent memory to live in."""
    return limits.memory_mb * MB // 2


async def clear(directory: Path, store: Store) -> None:
    """Removes the directory of a sandbox that has ended, and what the store knows of it."""
    try:
        store.forget(directory.name)
    except SandboxUnavailable as error:
        # The disk is full, perhaps with this.
        log.warning("sandbox %s is not forgotten yet: %s", directory.name, error)
    await asyncio.to_thread(remove_tree, directory)


async def await_agent(
    link: DialledLink,
    pid: int,
    is_agent: Callable[[int], bool],
    freezer: Freezer | None,
    *,
    paused: bool,
    patience_s: float,
    said: Callable[[], str],
) -> None:
    """Waits for the agent to dial; from then on the line fails when the sandbox ends.

    Args:
        link: The line.
        pid: Process on this host that lives as long as the sandbox.
        is_agent: Whether a process is the agent, by its id on this host.
        freezer: Of the sandbox.
        paused: Whether it was paused by a service that was killed; its agent will dial when it
            is resumed.
        patience_s: Seconds to wait.
        said: What the sandbox printed last on its own account, as a sentence or nothing.

    Raises:
        SandboxError: it does not come up.
    """
    _on_exit(pid, lambda: link.fail(SandboxLost(f"the sandbox has ended by itself.{said()}")))
    await link.listen(is_agent)
    if link.is_held and freezer is not None:
        if paused:
            # Unless it was killed just before it did so.
            await freezer.freeze()
            return
        # For a snapshot that came to no end.
        link.release()
        await freezer.thaw()
    try:
        async with asyncio.timeout(patience_s):
            await link.dialled()
    except BaseException as error:
        link.fail(SandboxLost("the sandbox did not start."))
        if isinstance(error, (TimeoutError, SandboxLost)):
            raise SandboxError(f"the sandbox does not start.{said()}") from None
        raise


def _on_exit(pid: int, callback: Callable[[], None]) -> None:
    """Calls back when a process of this host ends."""
    loop = asyncio.get_running_loop()
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        loop.call_soon(callback)
        return

    def ended() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        callback()

    loop.add_reader(pidfd, ended)
