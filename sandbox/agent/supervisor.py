"""A supervisor: the parent of a command and of everything that the command leaves behind."""

from __future__ import annotations

import array
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from sandbox.agent import processes

# Where a supervisor finds the agent; above what a job's descriptors are numbered.
_SOCKET = 20
_MESSAGE = 1 << 19

# Where a command finds the descriptors of its job: a session's shell has two more.
_PLACES = (0, 1, 2, 8, 9)

# Everything that the agent and its supervisors ignore and a command should not.
_IGNORED = tuple(
    number
    for number in signal.valid_signals()
    if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD)
)
_SIGNALS = tuple(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


class Supervisor:
    """The agent's end of a supervisor."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        """Wraps what `start` made."""
        self.pid, self.socket = pid, sock

    def run(self, argv: Sequence[str], env: Mapping[str, str], cwd: str, fds: list[int]) -> None:
        """Starts a job; `fds` become its standard streams and what `_PLACES` names further.

        Raises:
            OSError: the supervisor is dead, or the job's texts are too long.
        """
        fields = [cwd, str(len(argv)), *argv, *(f"{name}={value}" for name, value in env.items())]
        message = "\0".join(fields).encode("utf-8", "surrogateescape")
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        self.socket.sendmsg([message], [rights])

    def ended(self) -> tuple[int, str] | None:
        """Exit status and complaint of the job that has ended; None if the supervisor has."""
        try:
            message = self.socket.recv(4096)
        except OSError:
            return None
        if not message:
            return None
        status, _, complaint = message.decode("utf-8", "replace").partition(" ")
        return int(status), complaint


def start(serve: Callable[[socket.socket], object] | None = None) -> Supervisor:
    """Forks a supervisor, which runs one job after another.

    Args:
        serve: What the fork does instead, with its end of a socket of messages.

    Raises:
        OSError: there is no room for another process.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE)
    try:
        pid = os.fork()
    except OSError:
        ours.close()
        theirs.close()
        raise
    if pid == 0:
        try:
            (serve or _serve)(_seclude(theirs))
        finally:
            os._exit(1)
    theirs.close()
    ours.setblocking(False)
    return Supervisor(pid, ours)


def _seclude(sock: socket.socket) -> socket.socket:
    """Leaves a fork of the agent with nothing of it but the socket."""
    signal.set_wakeup_fd(-1)
    for number in _IGNORED:
        with suppress(OSError):
            signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if sock.fileno() != _SOCKET:  # The kernel refuses to put a descriptor where it is.
        os.dup2(sock.fileno(), _SOCKET, inheritable=False)
    os.closerange(3, _SOCKET)
    os.closerange(_SOCKET + 1, 4096)
    null = os.open("/dev/null", os.O_RDWR)
    for place in (0, 1, 2):
        os.dup2(null, place)
    os.close(null)
    return socket.socket(fileno=_SOCKET)


def _serve(sock: socket.socket) -> None:
    processes.become_subreaper()
    while True:
        message, ancillary, _, _ = sock.recvmsg(_MESSAGE, 256, socket.MSG_CMSG_CLOEXEC)
        if not message:
            os._exit(0)  # The agent is gone.
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data)
        status, complaint = _run(message, list(fds))
        sock.send(f"{status} {complaint}".encode("utf-8", "replace"))


def _run(message: bytes, fds: list[int]) -> tuple[int, str]:
    """Runs a job to its end; returns its exit status, and why it could not be started."""
    cwd, count, *fields = message.decode("utf-8", "surrogateescape").split("\0")
    argv, env = fields[: int(count)], fields[int(count) :]
    try:
        os.chdir(cwd)
        main = os.posix_spawn(
            argv[0],
            argv,
            dict(pair.split("=", 1) for pair in env),
            file_actions=[(os.POSIX_SPAWN_DUP2, *pair) for pair in zip(fds, _PLACES)],  # noqa: B905
            setsid=True,
            setsigmask=[],
            setsigdef=_SIGNALS,
        )
    except OSError as error:
        return 126, f"cannot start a command: {error.strerror}"
    finally:
        os.chdir("/")
        for fd in fds:
            os.close(fd)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == main:
            break
    while _has_children():
        processes.kill(lambda: processes.below([os.getpid()], processes.table()))
        time.sleep(0.0005)
    code = os.waitstatus_to_exitcode(status)
    return (code if code >= 0 else 128 - code), ""


def _has_children() -> bool:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True
