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

# The longest that nobody is heard after connections that were refused; the agent waits as long.
_MAX_REST_S = 0.25

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
        self._refused = 0
        self._pause: asyncio.TimerHandle | None = None
        self.standstill = Standstill(directory)

    async def listen(self, is_agent: Callable[[int], bool]) -> None:
        """Begins to hear the agent.

        Args:
            is_agent: Whether a process, by its id on this host, is the agent.
        """
        self._is_agent = is_agent
        self._listen_on()

    def fail(self, error: SandboxError) -> None:
        """Ends the line, and the listening."""
        super().fail(error)
        if self._pause is not None:
            self._pause.cancel()
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()

    def _listen_on(self) -> None:
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        """Takes a connection, if it is the agent's: it then replaces the last."""
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                self._rest(f"cannot be taken: {error.strerror}")
            return
        pid = _peer(sock)
        if self._is_agent is None or not self._is_agent(pid):
            sock.close()
            self._rest(f"is refused: process {pid} poses as the agent")
            return
        self.agent_pid = pid
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        self._taking = loop.create_task(loop.connect_accepted_socket(lambda: _Wire(self), sock))

    def _rest(self, why: str) -> None:
        """Listens to nobody for a while: whoever knocks without end is not to cost the service."""
        if self._refused == 0:
            log.warning("a connection to %s %s", self.directory, why)
        self._refused += 1
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        self._pause = loop.call_later(min(0.01 * self._refused, _MAX_REST_S), self._listen_on)


class _Wire(asyncio.Protocol):
    """One connection."""

    _transport: asyncio.Transport

    def __init__(self, link: DialledLink) -> None:
        self._link = link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._link.is_lost:
            transport.abort()
        else:
            self._link.attach(self)

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


def _peer(sock: socket.socket) -> int:
    """The process at the other end, by its id on this host."""
    given = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(given)[0])


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
