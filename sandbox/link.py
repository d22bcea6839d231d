"""The service's end of the line to one agent.

What runs in a sandbox may be hostile, so nothing that comes from there is believed: the peer must
be the very process that the backend started, frames are bounded, and a frame that is none ends
the sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

from sandbox.errors import BY_KIND, SandboxError, SandboxLost
from sandbox.protocol import VERSION, Decoder, Header, ProtocolError, encode
from sandbox.standstill import Standstill

log = logging.getLogger("sandbox")

# Over what a request itself may take: after that the agent has failed, not the command.
GRACE_S = 30.0

# What an agent that lives has to dial again after its connection broke.
_REDIAL_S = 2.0

_SLACK = 1 << 16
_CREDENTIALS = struct.Struct("3i")

Answer = tuple[Header, bytes]

# Called with "stdout" or "stderr" and bytes that a command has printed.
OnOutput = Callable[[str, bytes], None]


class Link:
    """Requests to one agent, which survive a broken connection."""

    def __init__(self, directory: Path, *, owner: int | None, max_payload: int) -> None:
        """Listens on a socket in `directory`, which is mounted into the sandbox.

        Args:
            directory: Where the socket is made; an earlier service's is replaced.
            owner: User that may connect, or None for this process's.
            max_payload: Bytes that an answer of this sandbox may hold.
        """
        self._max_payload = max_payload + _SLACK
        self._outstanding: dict[str, tuple[bytes, asyncio.Future[Answer]]] = {}
        # Who hears an operation's output, and how many bytes more of it.
        self._listeners: dict[str, tuple[OnOutput, int]] = {}
        self._received: list[str] = []
        self._wire: _Wire | None = None
        self._is_agent: Callable[[int], bool] | None = None
        self.agent_pid: int | None = None
        self._error: SandboxError | None = None
        self._ready = asyncio.get_running_loop().create_future()
        self.directory, self.owner = directory, owner
        self._listener = listen(directory, "agent.sock", owner)
        self._server: asyncio.Server | None = None
        self._standstill = Standstill(directory)
        # What is waited for, and the seconds that each has left once the agent runs again.
        self._patience: dict[asyncio.Timeout, float] = {}
        self._overdue = False

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

    async def dialled(self) -> None:
        """Waits for the agent that is listened for.

        Raises:
            SandboxError: it ended first.
        """
        await asyncio.shield(self._ready)

    @property
    def is_held(self) -> bool:
        """Whether the agent is frozen, or an earlier service that was killed had frozen it."""
        return self._standstill.began is not None

    def hold(self) -> None:
        """The agent is about to be frozen: what it owes is not late until it runs again."""
        self._standstill.begin()
        now = asyncio.get_running_loop().time()
        for timeout in self._patience:
            when = timeout.when()
            if when is not None and not timeout.expired():
                self._patience[timeout] = when - now
                timeout.reschedule(None)

    def release(self) -> None:
        """The agent is about to run again."""
        self._standstill.end()
        now = asyncio.get_running_loop().time()
        for timeout, left_s in self._patience.items():
            if not timeout.expired():
                timeout.reschedule(now + left_s)
        if self._overdue:
            self._overdue = False
            asyncio.get_running_loop().call_later(_REDIAL_S, self._give_up)

    @contextlib.asynccontextmanager
    async def _within(self, seconds: float) -> AsyncIterator[None]:
        """As `asyncio.timeout`, but for the time that the agent is frozen."""
        async with asyncio.timeout(None if self.is_held else seconds) as timeout:
            self._patience[timeout] = seconds
            try:
                yield
            finally:
                del self._patience[timeout]

    async def call(
        self,
        header: Header,
        payload: bytes = b"",
        *,
        timeout_s: float,
        keep: bool = False,
        on_output: OnOutput | None = None,
    ) -> Answer:
        """Sends a request and waits for its answer.

        Being cancelled ends it inside too, unless it is kept: then its caller may ask again.

        Args:
            header: The operation; its `id` is made here if it has none.
            payload: Bytes that go with it.
            timeout_s: Seconds until the agent, not the command, is held to have failed.
            keep: Whether the agent keeps the answer until it is acknowledged by a later `ack`.
            on_output: Hears what the command prints while it runs, as far as its head is kept.

        Raises:
            SandboxLost: the sandbox ended, or its agent does not answer.
            SandboxError: of the kind that the agent says.
        """
        if self._error is not None:
            raise self._error
        operation = header.setdefault("id", secrets.token_hex(8))
        if self._received:
            header["ack"] = [*header.get("ack", ()), *self._received]
            self._received.clear()
        if on_output is not None:
            header["stream"] = True
            self._listeners[operation] = on_output, self._max_payload
        _, future = self._outstanding.get(operation, (b"", None))
        if future is None:
            future = asyncio.get_running_loop().create_future()
            frame = encode(header, payload)
            self._outstanding[operation] = frame, future
            future.add_done_callback(lambda _: self._outstanding.pop(operation, None))
            self._send(frame)
        try:
            async with self._within(timeout_s):
                answer, data = await asyncio.shield(future)
        except TimeoutError:
            raise SandboxLost("the agent inside the sandbox does not answer.") from None
        except asyncio.CancelledError:
            if not keep:
                await self._cancel(operation, future)
            raise
        finally:
            self._listeners.pop(operation, None)
        if not keep:
            self._received.append(operation)
        if "error" in answer:
            kind = BY_KIND.get(str(answer["error"]), SandboxError)
            raise kind(str(answer.get("message")))
        return answer, data

    async def cancel(self, operation: str) -> None:
        """Ends an operation that its caller gave up; unknown ones are none."""
        self._send(encode({"op": "cancel", "target": operation, "ack": [operation]}))

    async def _cancel(self, operation: str, future: asyncio.Future[Answer]) -> None:
        self._send(encode({"op": "cancel", "target": operation}))
        # Until what the operation started is dead; nothing to wait for if the sandbox is.
        with suppress(SandboxError, TimeoutError):
            async with self._within(GRACE_S):
                await asyncio.shield(future)

    def fail(self, error: SandboxError) -> None:
        """Ends the line: every request, now and later, raises `error`."""
        if self._error is not None:
            return
        self._error = error
        for future in (self._ready, *(future for _, future in self._outstanding.values())):
            if not future.done():
                future.set_exception(error)
                future.exception()  # Whoever waits sees it; nobody may be waiting.
        if self._wire is not None:
            self._wire.transport.abort()
        (self._server or self._listener).close()

    @property
    def is_lost(self) -> bool:
        """Whether the agent has gone."""
        return self._error is not None

    def end(self) -> None:
        """Asks the agent to end the sandbox."""
        self._send(encode({"op": "exit"}))

    def _send(self, frame: bytes) -> None:
        if self._wire is not None:
            self._wire.transport.write(frame)

    def accept(self, wire: _Wire) -> bool:
        """Whether a new connection is the agent's; it then replaces the last."""
        pid = wire.peer()
        if self._error is not None or self._is_agent is None or not self._is_agent(pid):
            log.warning("process %d inside a sandbox poses as its agent; refused", pid)
            return False
        self.agent_pid = pid
        self._wire = wire
        wire.decoder = Decoder(self._max_payload)
        return True

    def receive(self, header: Header, payload: bytes) -> None:
        """Takes one frame of the agent.

        Raises:
            ProtocolError: it speaks another version, or more than it may.
        """
        if "hello" in header:
            if header["hello"] != VERSION:
                raise ProtocolError(f"version {header['hello']}, not {VERSION}")
            for frame, _ in self._outstanding.values():
                self._send(frame)
            if not self._ready.done():
                self._ready.set_result(None)
            return
        operation = str(header.get("id"))
        if "stream" in header:
            self._hear(operation, str(header["stream"]), payload)
            return
        _, future = self._outstanding.get(operation, (b"", None))
        if future is not None and not future.done():
            future.set_result((header, payload))

    def _hear(self, operation: str, name: str, payload: bytes) -> None:
        if operation not in self._listeners:
            return
        on_output, left = self._listeners[operation]
        if name not in ("stdout", "stderr") or not 0 < len(payload) <= left:
            raise ProtocolError("output that is none, or more than it may")
        self._listeners[operation] = on_output, left - len(payload)
        on_output(name, payload)

    def lost(self, wire: _Wire) -> None:
        """A connection broke; an agent that lives dials again."""
        if wire is self._wire and self._error is None:
            self._wire = None
            loop = asyncio.get_running_loop()
            loop.call_later(_REDIAL_S, self._give_up)

    def _give_up(self) -> None:
        if self._wire is None and self.is_held:
            self._overdue = True  # It cannot dial, frozen as it is.
        elif self._wire is None:
            self.fail(SandboxLost("the agent inside the sandbox has gone; so has the sandbox."))


class _Wire(asyncio.Protocol):
    """One connection."""

    transport: asyncio.Transport
    decoder: Decoder | None = None

    def __init__(self, link: Link) -> None:
        self._link = link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if not self._link.accept(self):
            transport.abort()

    def peer(self) -> int:
        """The process at the other end, by its id on this host."""
        sock = self.transport.get_extra_info("socket")
        given = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(given)[0])

    def data_received(self, data: bytes) -> None:
        if self.decoder is None:
            return
        try:
            for header, payload in self.decoder.feed(data):
                self._link.receive(header, payload)
        except ProtocolError as error:
            self._link.fail(SandboxLost(f"the agent inside the sandbox sent {error}."))

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
