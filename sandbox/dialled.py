"""A line that the agent dials: a Unix socket of this host, mounted into the sandbox."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from sandbox.errors import SandboxError
from sandbox.link import Link
from sandbox.standstill import Standstill

log = logging.getLogger("sandbox")

# What an agent that lives has to dial again after its connection broke.
_REDIAL_S = 2.0

_CREDENTIALS = struct.Struct("3i")


class DialledLink(Link):
    """The line to an agent of this host, whose process the kernel attests."""

    def __init__(self, directory: Path, *, owner: int | None, max_payload: int) -> None:
        """Listens on a socket in `directory`, which is mounted into the sandbox.

        Args:
            directory: Where the socket is made; an earlier service's is replaced.
            owner: User that may connect, or None for this process's.
            max_payload: Bytes that an answer of this sandbox may hold.
        """
        super().__init__(max_payload=max_payload, redial_s=_REDIAL_S)
        self._is_agent: Callable[[int], bool] | None = None
        self.directory, self.owner = directory, owner
        self._listener = listen(directory, "agent.sock", owner)
        self._server: asyncio.Server | None = None
        self.standstill = Standstill(directory)

    async def listen(self, is_agent: Callable[[int], bool]) -> None:
        """Begins to hear the agent.

        Args:
            is_agent: Whether a process, by its id on this host, is the agent.
        """
        loop = asyncio.get_running_loop()
        self._is_agent = is_agent
        self._server = await loop.create_unix_server(lambda: _Wire(self), sock=self._listener)

    async def connected(self, is_agent: Callable[[int], bool]) -> None:
        """Waits for the agent.

        Args:
            is_agent: As in `listen`.

        Raises:
            SandboxError: it ended first.
        """
        await self.listen(is_agent)
        await self.dialled()

    def fail(self, error: SandboxError) -> None:
        """Ends the line, and the listening."""
        super().fail(error)
        (self._server or self._listener).close()

    def accept(self, wire: _Wire) -> bool:
        """Whether a new connection is the agent's; it then replaces the last."""
        pid = wire.peer()
        if self.is_lost or self._is_agent is None or not self._is_agent(pid):
            log.warning("process %d inside a sandbox poses as its agent; refused", pid)
            return False
        self.agent_pid = pid
        self.attach(wire)
        return True


class _Wire(asyncio.Protocol):
    """One connection."""

    _transport: asyncio.Transport

    def __init__(self, link: DialledLink) -> None:
        self._link = link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not self._link.accept(self):
            transport.abort()

    def peer(self) -> int:
        """The process at the other end, by its id on this host."""
        sock = self._transport.get_extra_info("socket")
        given = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(given)[0])

    def write(self, frame: bytes) -> None:
        """Sends the bytes of a frame."""
        self._transport.write(frame)

    def abort(self) -> None:
        """Breaks the connection."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._link.feed(self, data)

    def connection_lost(self, error: Exception | None) -> None:
        self._link.lost(self)


def listen(directory: Path, name: str, owner: int | None) -> socket.socket:
    """A socket of that name in a directory, that a user may connect to; replaces an earlier one."""
    listener = socket.socket(socket.AF_UNIX)
    path = directory / name
    path.unlink(missing_ok=True)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        # However long the directory's own path is, this one fits into an address.
        listener.bind(f"/proc/self/fd/{fd}/{name}")
    finally:
        os.close(fd)
    if owner is not None:
        os.chown(path, owner, owner)
    path.chmod(0o600)
    listener.listen(8)
    listener.setblocking(False)
    return listener
