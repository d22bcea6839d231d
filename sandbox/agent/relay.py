"""The relay: programs of the sandbox dial a port of its loopback, and reach the egress proxy.

A process of its own below the agent, so that a flood of connections costs the agent nothing. What
passes is judged outside.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from contextlib import suppress

from sandbox.agent.loop import READ, WRITE, Loop

_NAME = "egress.sock"
_CHUNK = 1 << 16
_MAX_CONNECTIONS = 64
_AGAIN_S = 0.2

_DOWN = (
    b"HTTP/1.1 503 Service Unavailable\r\nX-Klong-Egress: down\r\nConnection: close\r\n"
    b"Content-Type: text/plain\r\n\r\negress: the proxy of the sandbox service does not answer.\n"
)


class _Side:
    """One end of a pump, and what waits to be written to it."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket, self.unsent = sock, bytearray()
        # Whether it has nothing more to say, and whether it has been told so of the other.
        self.ended = self.told = False


class Relay:
    """Connections from a port to the socket."""

    def __init__(self, listener: socket.socket) -> None:
        """Serves a listener."""
        self._loop, self._listener = Loop(), listener
        self._open = 0
        # Each takes two descriptors; a few are this process's.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._room = max(1, min(_MAX_CONNECTIONS, (files - 16) // 2))

    def run(self) -> None:
        """Serves until it is killed."""
        self._listener.setblocking(False)
        self._loop.watch(self._listener.fileno(), self._accept)
        self._loop.run()

    def _accept(self) -> None:
        try:
            near = self._listener.accept()[0]
        except OSError:
            return
        far = socket.socket(socket.AF_UNIX)
        try:
            far.connect(_NAME)
        except OSError:
            far.close()
            with suppress(OSError):
                near.setblocking(False)
                near.send(_DOWN)
                near.shutdown(socket.SHUT_WR)
                near.recv(_CHUNK)  # Unread bytes would reset the connection and lose the answer.
            near.close()
            return
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ends = _Side(near), _Side(far)
        for one in ends:
            one.socket.setblocking(False)
        self._open += 1
        if self._open >= self._room:
            self._loop.unwatch(self._listener.fileno())
        self._watch(ends)

    def _watch(self, ends: tuple[_Side, _Side]) -> None:
        for one, other in (ends, ends[::-1]):
            # Nothing is read while the other side does not take it.
            wants = READ if not one.ended and len(other.unsent) < _CHUNK else 0
            wants |= WRITE if one.unsent else 0
            if wants:
                self._loop.watch(
                    one.socket.fileno(),
                    lambda one=one, other=other: self._ready(one, other, ends),  # type: ignore[misc]
                    wants,
                )
            else:
                self._loop.unwatch(one.socket.fileno())

    def _ready(self, one: _Side, other: _Side, ends: tuple[_Side, _Side]) -> None:
        try:
            if not one.ended and len(other.unsent) < _CHUNK:
                with suppress(BlockingIOError):
                    data = one.socket.recv(_CHUNK)
                    other.unsent += data
                    one.ended = not data
            for to, source in ((one, other), (other, one)):
                with suppress(BlockingIOError):
                    while to.unsent:
                        del to.unsent[: to.socket.send(to.unsent)]
                if source.ended and not to.unsent and not to.told:
                    to.told = True
                    to.socket.shutdown(socket.SHUT_WR)
            over = all(side.told for side in ends)
        except OSError:
            over = True
        if over:
            self._close(ends)
        else:
            self._watch(ends)

    def _close(self, ends: tuple[_Side, _Side]) -> None:
        for side in ends:
            self._loop.unwatch(side.socket.fileno())
            side.socket.close()
        self._open -= 1
        self._loop.watch(self._listener.fileno(), self._accept)


def serve(port: int) -> None:
    """Serves in a process that has just been forked from the agent, in the sockets' directory."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.closerange(3, 4096)
    while True:
        try:
            listener = socket.create_server(("127.0.0.1", port), backlog=128)
            break
        except OSError:
            # Something of the sandbox's has the port, to its own loss.
            time.sleep(_AGAIN_S)
    Relay(listener).run()
