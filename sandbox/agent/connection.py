"""The agent's line to the service: dialled from inside, or brought by a bridge.

A service of the same host owns a socket, which the agent dials again whenever the line breaks. One
that is elsewhere puts a bridge into the sandbox, which connects to the agent. The bridge has the
user of the commands; the kernel says who it is: its parent is outside of the sandbox, as no
process is that anything inside has started.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress

from sandbox.agent.loop import READ, WRITE, Loop, Timer
from sandbox.protocol import VERSION, Decoder, Header, ProtocolError, encode

_NAME = "agent.sock"

# Where a bridge finds the agent. No name of the file system: none inside can take it away.
BRIDGED = "\0klong-agent"
_CREDENTIALS = struct.Struct("3i")
_MAX_WAITING = 8
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
        """Dials, or waits for a bridge.

        Args:
            loop: Where it is served.
            directory: Where the service's socket is; none, and a bridge comes.
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
        self._orphaning: Timer | None = None
        if directory:
            # From there the name is short enough for a socket's address, wherever it is.
            os.chdir(directory)
            self._restore = self._dial
        else:
            self._listen()
            self._restore = self._await_bridge
        self._restore()

    def _listen(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        # Who connects is told by the kernel, with the first byte.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        listener.bind(BRIDGED)
        listener.listen(_MAX_WAITING)
        self._strangers: list[socket.socket] = []

        def accept() -> None:
            with suppress(OSError):
                stranger = listener.accept()[0]
                stranger.setblocking(False)
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                self._strangers.append(stranger)
                self._loop.watch(stranger.fileno(), lambda: self._meet(stranger))
                if len(self._strangers) > _MAX_WAITING:
                    self._dismiss(self._strangers[0]).close()

        self._loop.watch(listener.fileno(), accept)

    def _dismiss(self, stranger: socket.socket) -> socket.socket:
        self._strangers.remove(stranger)
        self._loop.unwatch(stranger.fileno())
        return stranger

    def _meet(self, stranger: socket.socket) -> None:
        """Takes a bridge for the service; sends anyone else away."""
        self._dismiss(stranger)
        pid = 0
        with suppress(OSError):
            _, told, _, _ = stranger.recvmsg(1, socket.CMSG_SPACE(_CREDENTIALS.size))
            for _, kind, data in told:
                if kind == socket.SCM_CREDENTIALS:
                    pid = _CREDENTIALS.unpack(data)[0]
        if pid <= 1 or _parent(pid) != 0:
            stranger.close()
            return
        if self._socket is not None:
            # The service has lost it, and will know so before the agent does.
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
        # By this the bridge knows the agent.
        with suppress(OSError):
            stranger.send(b"\0")
        self._take(stranger)

    def _await_bridge(self) -> None:
        left_s = self._lost_at + self._patience_s - time.monotonic()
        if left_s <= 0:
            self._on_orphaned()
        self._orphaning = self._loop.later(left_s, self._await_bridge)

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
        self._take(dialled)

    def _take(self, connected: socket.socket) -> None:
        if self._orphaning is not None:
            self._orphaning.cancel()
        self._socket, self._decoder = connected, Decoder(_MAX_PAYLOAD)
        self._unsent.clear()
        self._loop.watch(connected.fileno(), self._ready)
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
        self._restore()


def _parent(pid: int) -> int:
    """The parent of a process, 0 if that is outside of the sandbox; -1 if there is none such."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return -1
