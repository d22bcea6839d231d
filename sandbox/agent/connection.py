"""The agent's line to the service: dialled from inside, again whenever it breaks."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from sandbox.agent.loop import READ, WRITE, Loop
from sandbox.protocol import VERSION, Decoder, Header, ProtocolError, encode

_NAME = "agent.sock"
_REDIAL_S = 0.05
_FIRST_DIAL_S = 10.0
_CHUNK = 1 << 18
_MAX_PAYLOAD = 1 << 26


class Connection:
    """Frames to and from whichever service listens on the socket."""

    def __init__(
        self,
        loop: Loop,
        directory: str,
        *,
        orphan_s: float,
        on_frame: Callable[[Header, bytes], None],
        on_orphaned: Callable[[], None],
    ) -> None:
        """Dials.

        Args:
            loop: Where it is served.
            directory: Where the service's socket is.
            orphan_s: Seconds without a service after which `on_orphaned` is called.
            on_frame: Called with each request.
            on_orphaned: Called once.
        """
        self._loop, self._on_frame, self._on_orphaned = loop, on_frame, on_orphaned
        self._orphan_s = orphan_s
        self._patience_s = max(orphan_s, _FIRST_DIAL_S)
        self._lost_at = time.monotonic()
        self._socket: socket.socket | None = None
        self._unsent = bytearray()
        # From there the name is short enough for a socket's address, wherever it is.
        os.chdir(directory)
        self._dial()

    def _dial(self) -> None:
        dialled = socket.socket(socket.AF_UNIX)
        try:
            dialled.connect(_NAME)
        except OSError:
            dialled.close()
            if time.monotonic() - self._lost_at >= self._patience_s:
                self._on_orphaned()
            self._loop.later(_REDIAL_S, self._dial)
            return
        dialled.setblocking(False)
        self._socket, self._decoder = dialled, Decoder(_MAX_PAYLOAD)
        self._unsent.clear()
        self._loop.watch(dialled.fileno(), self._ready)
        self._patience_s = self._orphan_s
        self.send(encode({"hello": VERSION, "pid": os.getpid()}))

    def outlive(self, seconds: float) -> None:
        """Sets the seconds without a service after which `on_orphaned` is called."""
        self._orphan_s = self._patience_s = seconds

    def send(self, frame: bytes) -> None:
        """Sends a frame, or drops it when there is no service: it will ask again."""
        if self._socket is not None:
            self._unsent += frame
            self._flush()

    def _ready(self) -> None:
        assert self._socket is not None
        if self._unsent:
            self._flush()
        try:
            data = self._socket.recv(_CHUNK) if self._socket is not None else b""
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            frames = self._decoder.feed(data) if data else None
        except ProtocolError:
            frames = None
        if frames is None:
            self._lost()
            return
        for header, payload in frames:
            self._on_frame(header, payload)

    def _flush(self) -> None:
        assert self._socket is not None
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(memoryview(self._unsent)[:_CHUNK])]
        except BlockingIOError:
            self._loop.watch(self._socket.fileno(), self._ready, READ | WRITE)
        except OSError:
            self._lost()
        else:
            self._loop.watch(self._socket.fileno(), self._ready)

    def _lost(self) -> None:
        if self._socket is None:
            return
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()
        self._socket = None
        self._lost_at = time.monotonic()
        self._loop.later(0, self._redial)

    def _redial(self) -> None:
        if self._patience_s <= 0:
            self._on_orphaned()
        self._dial()
