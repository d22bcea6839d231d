"""Commands under supervisors: their output, their deadline and their end."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress

from sandbox.agent import processes, supervisor
from sandbox.agent.loop import Loop, Timer, read_some
from sandbox.output import HeadTail

# Larger than the default: fewer switches between a command that prints much and the agent.
_PIPE_BYTES = 1 << 18

# How often the death of what was killed is looked for.
_SWEEP_S = 0.001

# Exit status of a command whose supervisor was killed under it: the command was, too.
_KILLED = 137


class Capture:
    """A pipe whose output is kept, head and tail."""

    def __init__(self, loop: Loop, limit: int) -> None:
        """Opens the pipe; `write_end` is for the command."""
        self._loop = loop
        self.kept = HeadTail(limit)
        # Hears the head as it is printed.
        self.on_head: Callable[[bytes], None] | None = None
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_end, False)
        with suppress(OSError):
            fcntl.fcntl(self._read_end, 1031, _PIPE_BYTES)  # F_SETPIPE_SZ, named in 3.10
        loop.watch(self._read_end, self._readable)

    def _readable(self) -> bool:
        data = read_some(self._read_end)
        if data:
            head = self.kept.feed(data)
            if head and self.on_head is not None:
                self.on_head(head)
        elif data is not None:
            self._loop.unwatch(self._read_end)
        return bool(data)

    def drain(self) -> None:
        """Reads what is in the pipe now, and no more than it holds."""
        end = self.kept.total + 2 * _PIPE_BYTES
        while self.kept.total < end and self._readable():
            pass

    def close(self) -> None:
        """Closes the agent's end."""
        self._loop.unwatch(self._read_end)
        os.close(self._read_end)

    def discard(self) -> None:
        """Closes both ends of one that no command got."""
        self.close()
        os.close(self.write_end)


class Outcome:
    """How a job ended; `status` is None when it was killed on request."""

    def __init__(self, status: int | None, complaint: str) -> None:
        """Wraps what its supervisor says."""
        self.status, self.complaint = status, complaint


# Supervisors that are kept for the next commands.
_MAX_IDLE = 2

# The kernel, out of memory, takes a supervisor or what is below it before the agent.
_FIRST_TO_GO, _LAST_TO_GO = b"500", b"0"


class Pool:
    """The supervisors of a sandbox; some wait idle, for a fork would be felt."""

    def __init__(self, loop: Loop) -> None:
        """Makes an empty pool."""
        self.loop = loop
        self.alive: set[int] = set()
        # Open before the agent's /proc is closed to itself, too.
        self._oom_score = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        self._idle: list[supervisor.Supervisor] = []

    def acquire(self) -> supervisor.Supervisor:
        """A supervisor without a job.

        Raises:
            OSError: none is idle and there is no room for another.
        """
        return self._idle.pop() if self._idle else self._start()

    def prepare(self) -> None:
        """Has one idle supervisor, if there is room."""
        if not self._idle:
            with suppress(OSError):
                self.release(self._start())

    def _start(self) -> supervisor.Supervisor:
        return self.fork(None)

    def fork(self, serve: Callable[[socket.socket], object] | None) -> supervisor.Supervisor:
        """Forks a supervisor, or another that serves; `alive` has it until it is reaped.

        Raises:
            OSError: there is no room for it.
        """
        # Inherited: set after its start it would come too late for what a command starts at once.
        os.write(self._oom_score, _FIRST_TO_GO)
        try:
            started = supervisor.start(serve)
        finally:
            os.write(self._oom_score, _LAST_TO_GO)
        self.alive.add(started.pid)
        return started

    def start_helper(self, serve: Callable[[], None]) -> int:
        """Forks a process of the agent's own, which no command's end sweeps away.

        Args:
            serve: Runs in it, and should not return.

        Raises:
            OSError: there is no room for it.
        """
        os.write(self._oom_score, _FIRST_TO_GO)
        try:
            pid = os.fork()
        finally:
            os.write(self._oom_score, _LAST_TO_GO)
        if pid == 0:
            try:
                serve()
            finally:
                os._exit(1)
        self.alive.add(pid)
        return pid

    def release(self, one: supervisor.Supervisor) -> None:
        """Takes back a supervisor whose job is over."""
        if len(self._idle) >= _MAX_IDLE:
            self.discard(one)
        else:
            self._idle.append(one)
            self.loop.watch(one.socket.fileno(), lambda: self._died(one))

    def _died(self, one: supervisor.Supervisor) -> None:
        # Killed while idle; its socket says so before its process is reaped.
        self._idle.remove(one)
        self.discard(one)

    def discard(self, one: supervisor.Supervisor) -> None:
        """Closes the agent's end of a supervisor, at which it ends."""
        self.loop.unwatch(one.socket.fileno())
        one.socket.close()

    def reap(self) -> None:
        """Collects the dead children of the agent."""
        with suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                self.alive.discard(pid)

    def escaped(self) -> set[int]:
        """What supervisors that were killed have left to the agent, and all below it."""
        table = processes.table()
        me = os.getpid()
        heads = {p for p, process in table.items() if process.parent == me} - self.alive
        return heads | processes.below(heads, table)


class Job:
    """One command; `on_end` hears of its end, when all that it started is dead."""

    def __init__(
        self,
        pool: Pool,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        stdin: int,
        *,
        keep: int,
        on_end: Callable[[Outcome], None],
        more: Sequence[int] = (),
    ) -> None:
        """Starts it.

        Args:
            pool: Where its supervisor comes from.
            argv: Program by its absolute path, and arguments.
            env: Its whole environment.
            cwd: Its working directory.
            stdin: Descriptor of its standard input; stays the caller's.
            keep: Bytes kept of each stream.
            on_end: Called once.
            more: Descriptors 8 and 9 of the command; stay the caller's.

        Raises:
            OSError: there is no room for it.
        """
        self._pool, self._on_end = pool, on_end
        with ExitStack() as undo:
            self.out = Capture(pool.loop, keep)
            undo.callback(self.out.discard)
            self.err = Capture(pool.loop, keep)
            undo.callback(self.err.discard)
            self.supervisor = pool.acquire()
            undo.pop_all()
        self.started = time.monotonic()
        self._deadline: Timer | None = None
        self._doomed = False
        self.timed_out = False
        self._killed_status: int | None = None
        pool.loop.watch(self.supervisor.socket.fileno(), self._reported)
        fds = [stdin, self.out.write_end, self.err.write_end, *more]
        try:
            self.supervisor.run(argv, env, cwd, fds)
        except OSError:
            self._supervisor_lost()
        finally:
            os.close(self.out.write_end)
            os.close(self.err.write_end)

    def limit(self, seconds: float) -> None:
        """Kills it after a time."""
        self._deadline = self._pool.loop.later(seconds, self._time_out)

    def _time_out(self) -> None:
        self.timed_out = True
        self.kill()

    def kill(self) -> None:
        """Kills it with everything it started; `on_end` is called once all are dead."""
        if not self._doomed:
            self._doomed = True
            self._pool.loop.unwatch(self.supervisor.socket.fileno())
            # Never before the caller holds the job that `on_end` is about.
            self._pool.loop.later(0, self._sweep)

    def _reported(self) -> None:
        ended = self.supervisor.ended()
        if ended is None:
            self._supervisor_lost()
            return
        self._pool.loop.unwatch(self.supervisor.socket.fileno())
        self._pool.release(self.supervisor)
        self._end(Outcome(*ended))

    def _supervisor_lost(self) -> None:
        self._killed_status = _KILLED
        self.kill()

    def _sweep(self) -> None:
        pid, pool = self.supervisor.pid, self._pool

        def find() -> set[int]:
            own = set()
            if pid in pool.alive:
                own = {pid} | processes.below([pid], processes.table())
            return own | pool.escaped()

        processes.kill(find)
        pool.reap()
        if pid in pool.alive or pool.escaped():
            pool.loop.later(_SWEEP_S, self._sweep)
            return
        pool.discard(self.supervisor)
        self._end(Outcome(None if self.timed_out else self._killed_status, ""))

    def _end(self, outcome: Outcome) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        for capture in (self.out, self.err):
            capture.drain()
            capture.close()
        self._on_end(outcome)
