"""What the agent does for the service: operations by name, each idempotent by its id."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from sandbox.agent import processes, relay
from sandbox.agent.connection import Connection
from sandbox.agent.jobs import Capture, Job, Outcome, Pool
from sandbox.agent.look import look
from sandbox.agent.loop import Loop
from sandbox.agent.results import Results
from sandbox.agent.sessions import Session
from sandbox.agent.transfer import Transfer
from sandbox.protocol import FROZEN_FILE, Header, encode

# As in `typing`, whose import a sandbox would wait for.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_MAX_SESSIONS = 64
_MAX_TRANSFERS = 16
_RELAY_AGAIN_S = 0.2

# Between two looks at whether all that was to end has ended.
_HALT_S = 0.005


class Refusal(Exception):
    """An operation that cannot be done; its arguments are the error's kind and sentence."""


class Server:
    """The agent of one sandbox."""

    def __init__(
        self, directory: str, *, lifetime_s: float, orphan_s: float, relay_port: int | None
    ) -> None:
        """Prepares it.

        Args:
            directory: Where the service's socket is; none where a bridge will come.
            lifetime_s: Seconds after which it ends.
            orphan_s: Seconds that it outlives the loss of the service.
            relay_port: Where the relay to the egress proxy listens; None: there is none.
        """
        self._directory, self._lifetime_s, self._orphan_s = directory, lifetime_s, orphan_s
        self._durable = orphan_s >= lifetime_s
        self._relay_port, self._relay = relay_port, 0
        self._loop = Loop()
        self._pool = Pool(self._loop)
        self._results = Results()
        # What runs, by operation id: how to cancel it.
        self._running: dict[str, Callable[[], None]] = {}
        self._cancelled: set[str] = set()
        self._halts: set[str] = set()
        self._sessions: dict[str, Session] = {}
        self._operations: dict[str, Callable[[str, Header, bytes], None]] = {
            "exec": self._exec,
            "open": self._open,
            "run": self._run,
            "close": self._close,
            "live": self._live,
            "transfer": self._transfer,
            "move": self._continue,
            "directory": self._check_directory,
            "look": self._look,
            "halt": self._halt,
        }
        self._transfers: dict[str, Transfer] = {}

    def run(self) -> NoReturn:
        """Serves until the sandbox is over."""
        processes.harden()
        processes.become_subreaper()
        self._watch_children()
        if self._directory:
            self._loop.heed(f"{self._directory}/{FROZEN_FILE}")
        self._expiry = self._loop.later(self._lifetime_s, self._finish, even_frozen=True)
        self._connection = Connection(
            self._loop,
            self._directory,
            orphan_s=self._orphan_s,
            on_frame=self._handle,
            on_orphaned=self._finish,
        )
        gc.collect()
        gc.freeze()  # Forks share what is not collected.
        self._pool.prepare()
        self._tend_relay()
        self._loop.run()
        raise AssertionError("the loop never returns")

    def _watch_children(self) -> None:
        # The first process of a namespace hears no signal from inside that it does not handle.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

        def reap() -> None:
            with suppress(BlockingIOError):
                os.read(read_end, 4096)
            self._pool.reap()
            if self._relay and self._relay not in self._pool.alive:
                self._relay = 0
                self._loop.later(_RELAY_AGAIN_S, self._tend_relay)

        self._loop.watch(read_end, reap)

    def _tend_relay(self) -> None:
        """Starts the relay, also when something of the sandbox's has killed it."""
        port = self._relay_port
        if port is not None:
            try:
                self._relay = self._pool.start_helper(lambda: relay.serve(port))
            except OSError:
                self._loop.later(_RELAY_AGAIN_S, self._tend_relay)

    def _finish(self) -> NoReturn:
        """Ends the agent, and with it the sandbox."""
        while processes.kill(lambda: processes.below([os.getpid()], processes.table())):
            self._pool.reap()
        os._exit(0)

    def _handle(self, header: Header, payload: bytes) -> None:
        for arrived in header.get("ack", ()):
            self._results.acknowledge(arrived)
        name: str = header["op"]
        if name == "exit":
            self._finish()
        if name == "cancel":
            self._cancel(header["target"])
            return
        operation: str = header["id"]
        answered = self._results.get(operation)
        if answered is not None:
            self._connection.send(answered)
        elif operation not in self._running:
            self._begin(name, operation, header, payload)

    def _begin(self, name: str, operation: str, header: Header, payload: bytes) -> None:
        try:
            self._operations[name](operation, header, payload)
        except Refusal as refusal:
            kind, message = refusal.args
            self._answer(operation, {"error": kind, "message": message})
        except OSError as error:
            # No process, descriptor or memory left inside: the sandbox's own doing, so a result.
            complaint = f"sandbox: cannot start a command: {error.strerror}\n".encode()
            size = len(complaint)
            streams = {"out": [0, 0, 0], "err": [size, 0, size]}
            self._answer(operation, {"exit": 126, "duration": 0.0, **streams}, complaint)

    def _cancel(self, operation: str) -> None:
        stop = self._running.get(operation)
        if stop is not None:
            self._cancelled.add(operation)
            stop()

    def _answer(self, operation: str, result: Header, payload: bytes = b"") -> None:
        self._running.pop(operation, None)
        frame = encode({"id": operation, **result}, payload)
        if operation in self._cancelled:
            # Its caller has gone; the frame only tells the service that all is dead.
            self._cancelled.discard(operation)
        else:
            self._results.add(operation, frame)
        self._connection.send(frame)

    def _exec(self, operation: str, header: Header, payload: bytes) -> None:
        stdin = _input(payload)
        job: Job | None = None

        def on_end(outcome: Outcome) -> None:
            assert job is not None
            if outcome.complaint:
                job.err.kept.feed(f"sandbox: {outcome.complaint}\n".encode())
            result: Header = {"exit": outcome.status}
            self._answer_command(
                operation, job, result, started=job.started, timed_out=job.timed_out
            )

        try:
            env = {**os.environ, **header["env"]}
            job = Job(
                self._pool,
                header["argv"],
                env,
                header["cwd"],
                stdin,
                keep=header["keep"],
                on_end=on_end,
            )
        finally:
            os.close(stdin)
        job.limit(header["timeout"])
        self._stream(operation, header, job)
        self._running[operation] = job.kill

    def _stream(self, operation: str, header: Header, job: Job) -> None:
        """Sends the heads of a command's output as they come, if the service asks for them."""

        def sender(name: str) -> Callable[[bytes], None]:
            frame = {"id": operation, "stream": name}
            return lambda head: self._connection.send(encode(frame, head))

        for name, capture in (("stdout", job.out), ("stderr", job.err)):
            capture.on_head = sender(name) if header.get("stream") else None

    def _answer_command(
        self, operation: str, job: Job, result: Header, *, started: float, timed_out: bool
    ) -> None:
        result["timed_out"] = timed_out
        result["duration"] = time.monotonic() - started
        parts: list[bytes] = []
        for name, capture in (("out", job.out), ("err", job.err)):
            sizes, kept = _taken(capture)
            result[name] = sizes
            parts += kept
        self._answer(operation, result, b"".join(parts))

    def _live(self, operation: str, header: Header, _payload: bytes) -> None:
        """A sandbox that waited has a caller: its lifetime begins."""
        self._expiry.cancel()
        self._expiry = self._loop.later(header["lifetime"], self._finish, even_frozen=True)
        if self._durable:
            self._connection.outlive(header["lifetime"])
        self._answer(operation, {})

    def _look(self, operation: str, header: Header, _payload: bytes) -> None:
        """Answers with what runs, for a snapshot."""
        known = {**os.environ, **header["env"]}

        def on_look(shells: list[Header], processes: int) -> None:
            text = json.dumps(shells).encode()
            self._answer(operation, {"processes": processes}, text)

        look(self._pool, self._sessions, known, limit=header["limit"], on_look=on_look)

    def _open(self, operation: str, header: Header, payload: bytes) -> None:
        name = header["session"]
        if name in self._sessions:
            raise Refusal("refused", f"there is a session {name!r} already; choose another name.")
        if len(self._sessions) >= _MAX_SESSIONS:
            raise Refusal("refused", f"there are {_MAX_SESSIONS} sessions already; close one.")

        def on_status(status: int | None) -> None:
            if status == 0:
                self._answer(operation, {})
            else:
                del self._sessions[name]
                message = f"session {name!r}: its shell did not start (status {status})."
                self._answer(operation, {"error": "refused", "message": message})

        env = {**os.environ, **header["env"]}
        if payload:
            # Of a session in a snapshot; its texts need not be UTF-8, as a header's must.
            env.update(json.loads(payload)["env"])
            for variable in json.loads(payload)["unset"]:
                env.pop(variable, None)
        try:
            session = Session(
                self._pool,
                env,
                header["cwd"],
                header["prelude"],
                keep=header["keep"],
            )
        except OSError as error:
            message = f"session {name!r}: its shell cannot be started: {error.strerror}."
            raise Refusal("refused", message) from None
        self._sessions[name] = session
        self._running[operation] = session.close
        session.run(":", None, on_status)

    def _run(self, operation: str, header: Header, payload: bytes) -> None:
        name = header["session"]
        session = self._sessions.get(name)
        if session is None:
            raise Refusal("session_ended", f"there is no session {name!r}; open it first.")
        if session.over:
            raise Refusal(
                "session_ended", f"session {name!r} has ended with its shell; open another."
            )
        if session.busy:
            raise Refusal("refused", f"session {name!r} runs a command; wait for its end.")
        started = time.monotonic()

        def on_status(status: int | None) -> None:
            result: Header = {"exit": status, "ended": session.over}
            self._answer_command(
                operation, session.job, result, started=started, timed_out=session.timed_out
            )

        self._running[operation] = session.interrupt
        self._stream(operation, header, session.job)
        session.run(payload.decode("utf-8", "surrogateescape"), header["timeout"], on_status)

    def _close(self, operation: str, header: Header, _payload: bytes) -> None:
        session = self._sessions.pop(header["session"], None)
        if session is not None and not session.over:
            session.on_over = lambda: self._answer(operation, {})
            self._running[operation] = session.close
            session.close()
        else:
            self._answer(operation, {})

    def _transfer(self, operation: str, header: Header, payload: bytes) -> None:
        """Begins a transfer, named by the operation, with its first chunk."""
        if len(self._transfers) >= _MAX_TRANSFERS:
            raise Refusal("unavailable", f"{_MAX_TRANSFERS} files are under way; wait for one.")

        def over() -> None:
            del self._transfers[operation]

        try:
            self._transfers[operation] = Transfer(self._pool, header, over)
        except OSError as error:
            raise Refusal("refused", f"files cannot be moved: {error.strerror}.") from None
        self._move(operation, operation, header, payload)

    def _continue(self, operation: str, header: Header, payload: bytes) -> None:
        self._move(operation, header["transfer"], header, payload)

    def _move(self, operation: str, name: str, header: Header, payload: bytes) -> None:
        transfer = self._transfers.get(name)
        if transfer is None:
            raise Refusal("failed", "the transfer is over; begin another.")

        def answer(result: Header, data: bytes) -> None:
            self._answer(operation, result, data)

        self._running[operation] = transfer.stop
        if "last" in header:
            transfer.push(payload, last=header["last"], answer=answer)
        else:
            transfer.pull(answer)

    def _check_directory(self, operation: str, header: Header, _payload: bytes) -> None:
        from pathlib import Path

        from sandbox.errors import SandboxError
        from sandbox.workspace import Workspace

        try:
            Workspace(Path(header["root"]), owner=None, max_bytes=0).directory(header["path"])
        except SandboxError as error:
            raise Refusal(error.kind, str(error)) from None
        self._answer(operation, {})

    def _halt(self, operation: str, _header: Header, _payload: bytes) -> None:
        """Ends every session and whatever else runs."""
        for session in self._sessions.values():
            if not session.over:
                session.close()
        for stop in list(self._running.values()):
            stop()
        self._running[operation] = lambda: None
        # Others wait as this one does.
        self._halts.add(operation)

        def wait() -> None:
            alone = self._running.keys() <= self._halts
            if alone and all(session.over for session in self._sessions.values()):
                self._answer(operation, {})
                self._halts.discard(operation)
            else:
                self._loop.later(_HALT_S, wait)

        wait()


def _input(data: bytes) -> int:
    """A descriptor from which a command reads `data`."""
    if not data:
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _taken(capture: Capture) -> tuple[list[int], list[bytes]]:
    head, tail, total = capture.kept.take()
    return [len(head), len(tail), total], [head, tail]
