"""The service's end of the line to one agent.

What runs in a sandbox may be hostile, so nothing that comes from there is believed: whatever
carries the line sees to it that the peer is the agent, frames are bounded, and a frame that is
none ends the sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol

from sandbox.errors import BY_KIND, SandboxError, SandboxLost
from sandbox.protocol import VERSION, Decoder, Header, ProtocolError, encode
from sandbox.standstill import Standstill

log = logging.getLogger("sandbox")

# Over what a request itself may take: after that the agent has failed, not the command.
GRACE_S = 30.0

_SLACK = 1 << 16

Answer = tuple[Header, bytes]

# Called with "stdout" or "stderr" and bytes that a command has printed.
OnOutput = Callable[[str, bytes], None]


class Wire(Protocol):
    """One connection to the agent; its owner calls `Link.attach`, `feed` and `lost`."""

    def write(self, frame: bytes) -> None:
        """Sends, or keeps to send, the bytes of a frame."""

    def abort(self) -> None:
        """Breaks the connection."""


class Link:
    """Requests to one agent, which survive a broken connection."""

    def __init__(self, *, max_payload: int, redial_s: float) -> None:
        """Waits for a connection, which whoever carries the line attaches.

        Args:
            max_payload: Bytes that an answer of this sandbox may hold.
            redial_s: Seconds without a connection after which the agent is held to be gone.
        """
        self._max_payload, self._redial_s = max_payload + _SLACK, redial_s
        self._outstanding: dict[str, tuple[bytes, asyncio.Future[Answer]]] = {}
        # Who hears an operation's output, and how many bytes more of it.
        self._listeners: dict[str, tuple[OnOutput, int]] = {}
        self._received: list[str] = []
        self._wire: Wire | None = None
        self._decoder = Decoder(self._max_payload)
        self.agent_pid: int | None = None
        self._error: SandboxError | None = None
        self._ready = asyncio.get_running_loop().create_future()
        # Of one that can be frozen: for how long it was.
        self.standstill: Standstill | None = None
        # What is waited for, and the seconds that each has left once the agent runs again.
        self._patience: dict[asyncio.Timeout, float] = {}
        self._overdue = False

    async def dialled(self) -> None:
        """Waits until the agent has said hello.

        Raises:
            SandboxError: it ended first.
        """
        await asyncio.shield(self._ready)

    @property
    def is_held(self) -> bool:
        """Whether the agent is frozen, or an earlier service that was killed had frozen it."""
        return self.standstill is not None and self.standstill.began is not None

    def hold(self) -> None:
        """The agent is about to be frozen: what it owes is not late until it runs again."""
        if self.standstill is not None:
            self.standstill.begin()
        now = asyncio.get_running_loop().time()
        for timeout in self._patience:
            when = timeout.when()
            if when is not None and not timeout.expired():
                self._patience[timeout] = when - now
                timeout.reschedule(None)

    def release(self) -> None:
        """The agent is about to run again."""
        if self.standstill is not None:
            self.standstill.end()
        now = asyncio.get_running_loop().time()
        for timeout, left_s in self._patience.items():
            if not timeout.expired():
                timeout.reschedule(now + left_s)
        if self._overdue:
            self._overdue = False
            asyncio.get_running_loop().call_later(self._redial_s, self._give_up)

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
            self._wire.abort()

    @property
    def is_lost(self) -> bool:
        """Whether the agent has gone."""
        return self._error is not None

    def end(self) -> None:
        """Asks the agent to end the sandbox."""
        self._send(encode({"op": "exit"}))

    def _send(self, frame: bytes) -> None:
        if self._wire is not None:
            self._wire.write(frame)

    def attach(self, wire: Wire) -> None:
        """Takes a new connection of the agent, which replaces the last."""
        self._wire, self._decoder = wire, Decoder(self._max_payload)

    def feed(self, wire: Wire, data: bytes) -> None:
        """Takes what a connection has brought; bytes of one that was replaced are dropped."""
        if wire is not self._wire:
            return
        try:
            for header, payload in self._decoder.feed(data):
                self._receive(header, payload)
        except ProtocolError as error:
            self.fail(SandboxLost(f"the agent inside the sandbox sent {error}."))

    def _receive(self, header: Header, payload: bytes) -> None:
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

    def lost(self, wire: Wire) -> None:
        """A connection broke; an agent that lives makes another."""
        if wire is self._wire and self._error is None:
            self._wire = None
            loop = asyncio.get_running_loop()
            loop.call_later(self._redial_s, self._give_up)

    def _give_up(self) -> None:
        if self._wire is None and self.is_held:
            self._overdue = True  # It cannot dial, frozen as it is.
        elif self._wire is None:
            self.fail(SandboxLost("the agent inside the sandbox has gone; so has the sandbox."))
