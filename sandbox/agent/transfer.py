"""Files between the service and a workspace that is no directory of the service's host.

A process forked for each transfer does the work, with the modules that the service uses on its
own host: the agent serves commands meanwhile, and what goes wrong is not its end. Bytes go
between the two in messages of one kind byte and some data; the service moves them by chunks, each
an operation of its own, so neither side holds more than one.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from sandbox.agent.jobs import Pool
from sandbox.agent.loop import READ, WRITE
from sandbox.protocol import Header

# As in `typing`, whose import a sandbox would wait for.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

Answer = Callable[[Header, bytes], None]

CHUNK = 1 << 19
_MESSAGE = 1 << 16
_DATA, _END = b"D", b"E"

# Without a request for so long, a transfer has lost its service.
_IDLE_S = 60.0


class Transfer:
    """The agent's end of one transfer."""

    def __init__(self, pool: Pool, header: Header, on_over: Callable[[], None]) -> None:
        """Forks a process for it.

        Args:
            pool: Where its process counts.
            header: `kind` (read, write, pack or unpack), `root`, `path` and `max`.
            on_over: Called once.

        Raises:
            OSError: there is no room for it.
        """
        # Imported once, here, and not by each process that is forked.
        from sandbox import archive  # noqa: F401

        self._pool, self._on_over = pool, on_over
        self._worker = pool.fork(lambda sock: _work(sock, header))
        self._inbox, self._outbox = bytearray(), deque[bytes]()
        self._end: Header | None = None
        self._pushing = header["kind"] in ("write", "unpack")
        self._last = False
        self._answer: Answer | None = None
        self._idle = pool.loop.later(_IDLE_S, self.stop)

    def pull(self, answer: Answer) -> None:
        """Answers with the next chunk, and whether more follow."""
        self._begin(answer)

    def push(self, data: bytes, *, last: bool, answer: Answer) -> None:
        """Answers once a chunk is taken; after the last one, when all is done."""
        self._last = last
        for place in range(0, len(data), _MESSAGE):
            self._outbox.append(_DATA + data[place : place + _MESSAGE])
        if last:
            self._outbox.append(_END)
        self._begin(answer)

    def stop(self) -> None:
        """Ends it; nothing half-written stays."""
        with suppress(ProcessLookupError):
            if self._worker.pid in self._pool.alive:
                os.kill(self._worker.pid, signal.SIGTERM)
        self._end = {"error": "failed", "message": "the transfer was given up."}
        self._deliver()

    def _begin(self, answer: Answer) -> None:
        self._idle.cancel()
        self._answer = answer
        self._move()

    def _move(self) -> None:
        sock = self._worker.socket
        with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._outbox:
                sock.send(self._outbox[0])
                self._outbox.popleft()
        with suppress(BlockingIOError):
            while self._end is None and len(self._inbox) < CHUNK:
                self._take(_receive(sock))
        pulled = len(self._inbox) >= CHUNK
        pushed = self._pushing and not self._outbox and not self._last
        if self._end is not None or pulled or pushed:
            self._deliver()
        else:
            events = READ | WRITE if self._outbox else READ
            self._pool.loop.watch(sock.fileno(), self._move, events)

    def _take(self, message: bytes) -> None:
        if message[:1] == _DATA:
            self._inbox += message[1:]
        elif message[:1] == _END:
            self._end = json.loads(message[1:])
        else:
            text = "the process that moves files was killed, perhaps for want of memory."
            self._end = {"error": "refused", "message": text}

    def _deliver(self) -> None:
        answer, self._answer = self._answer, None
        self._pool.loop.unwatch(self._worker.socket.fileno())
        data, self._inbox = bytes(self._inbox), bytearray()
        over = self._end is not None
        if over:
            self._idle.cancel()
            self._worker.socket.close()
        else:
            self._idle = self._pool.loop.later(_IDLE_S, self.stop)
        if answer is not None:
            answer({"more": not over, **(self._end or {})}, data)
        if over:
            self._on_over()


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(_MESSAGE + 1)
    except ConnectionResetError:
        # It ended before it had read all that it was sent; what it said last is there.
        return sock.recv(_MESSAGE + 1)


def _work(sock: socket.socket, header: Header) -> None:
    """Does a transfer in a process of its own, and says how it ended."""
    # As an error, so that what is half-written is removed.
    signal.signal(signal.SIGTERM, lambda _number, _frame: _exit())
    from sandbox.errors import SandboxError

    end: Header = {}
    try:
        _transfer(sock, header)
    except SandboxError as error:
        end = {"error": error.kind, "message": str(error)}
    except MemoryError:
        end = {"error": "refused", "message": "the sandbox has no memory left to move files."}
    except OSError as error:
        end = {"error": "refused", "message": f"the workspace fails: {error.strerror}."}
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = f"path {header['path']!r} has no room: the sandbox's disk is full."
            end = {"error": "too_large", "message": message}
    sock.send(_END + json.dumps(end).encode())


def _exit() -> None:
    raise SystemExit(0)


def _transfer(sock: socket.socket, header: Header) -> None:
    from pathlib import Path
    from tempfile import TemporaryFile

    from sandbox import archive
    from sandbox.errors import SandboxTooLarge
    from sandbox.workspace import Workspace

    workspace = Workspace(Path(header["root"]), owner=None, max_bytes=header["max"])
    kind, path = header["kind"], header["path"]
    stream: Any = _Stream(sock)
    if kind == "read":
        with workspace.opened(path) as file:
            while data := file.read(_MESSAGE):
                stream.write(data)
                if stream.place > workspace.max_bytes:
                    raise SandboxTooLarge(
                        f"path {path!r} is over the limit of {workspace.max_bytes} bytes."
                    )
    elif kind == "write":
        workspace.write(path, stream)
    elif kind == "pack":
        archive.pack(workspace, stream)
    else:
        # Read more than once: a hard link stands for what came before it.
        with TemporaryFile() as file:
            while data := stream.read(_MESSAGE):
                file.write(data)
            file.seek(0)
            archive.unpack(workspace, file)


class _Stream:
    """What `shutil` and `tarfile` need of a file, over the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self.place = sock, 0

    def read(self, _size: int) -> bytes:
        message = self._socket.recv(_MESSAGE + 1)
        if not message:
            _exit()  # The agent has closed its end.
        return message[1:]

    def write(self, data: bytes) -> int:
        for place in range(0, len(data), _MESSAGE):
            self._socket.send(_DATA + data[place : place + _MESSAGE])
        self.place += len(data)
        return len(data)

    def tell(self) -> int:
        return self.place
