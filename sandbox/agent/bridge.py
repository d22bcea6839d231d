"""`python3 -ISB bridge.py`: the line of an agent whose service is on another machine.

Started by `pods/exec` in the sandbox of the agent. It carries bytes between its standard streams,
which the service holds, and the agent. Everything in the sandbox has one user, so it is closed to
tracing first, and leaves if somebody was faster.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

sys.path.insert(0, __file__.rpartition("/sandbox/")[0])

from sandbox.agent import processes
from sandbox.agent.connection import BRIDGED

_CHUNK = 1 << 16
_CREDENTIALS = struct.Struct("3i")
_AGENT = 1

# Seconds that an agent may take to come up.
_PATIENCE_S = 30.0


def main() -> None:
    """Carries until either end closes."""
    processes.harden()
    with open("/proc/self/status") as file:
        if "TracerPid:\t0\n" not in file.read():
            sys.exit("bridge: traced by a command of the sandbox")
    line = _connect()

    def inward() -> None:
        _pump(lambda: os.read(0, _CHUNK), line.sendall)

    def outward() -> None:
        _pump(lambda: line.recv(_CHUNK), _write)

    threading.Thread(target=inward, daemon=True).start()
    outward()


def _connect() -> socket.socket:
    """A connection to the agent, which the kernel says that it is."""
    deadline = time.monotonic() + _PATIENCE_S
    line = socket.socket(socket.AF_UNIX)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    while True:
        try:
            line.connect(BRIDGED)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"bridge: no agent: {error.strerror}")
            time.sleep(0.02)
    line.send(b"\0")
    first, told, _, _ = line.recvmsg(1, socket.CMSG_SPACE(_CREDENTIALS.size))
    pids = [
        _CREDENTIALS.unpack(data)[0] for _, kind, data in told if kind == socket.SCM_CREDENTIALS
    ]
    if first != b"\0" or pids != [_AGENT]:
        sys.exit("bridge: what answers is not the agent")
    line.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
    return line


def _pump(read: Callable[[], bytes], write: Callable[[bytes], object]) -> None:
    try:
        while data := read():
            write(data)
    except OSError:
        pass
    os._exit(0)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    main()
