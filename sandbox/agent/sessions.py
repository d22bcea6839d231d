"""A session: one shell that lives between commands, with its directory, variables and jobs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

from sandbox.agent import processes
from sandbox.agent.jobs import Job, Outcome, Pool
from sandbox.agent.loop import WRITE, Timer, read_some

_SHELLS = (
    ("/bin/bash", "--noprofile", "--norc", "/dev/fd/8"),
    ("/bin/sh", "/dev/fd/8"),
)

# The signal at which the shell returns from the command that it runs, and leaves the rest undone.
# It returns from one function a time, so that what follows a call may begin before the next.
_RETURN = 41

# The shell sources each command, so that the command can be left; `command` keeps a syntax error
# from ending a POSIX shell. The text is quoted by a word that no command can hold.
_SCRIPT = """{0}trap 'return 143' {3}
command . /dev/fd/7 7<<'{2}' 8<&- 9>&-
{1}
{2}
echo $? >&9; trap '' {3}
"""

# The environment that the shell gives to what it starts, by the way that its statuses go; as a
# group, so that nothing is traced to standard error, and never failing, which may end a shell.
_TELL = "{ \\command -p env -0 8<&- || :; \\printf '\\0\\n'; } >&9 2>/dev/null\n"
_TOLD = b"\0\0\n"

# Bytes kept of one, its end included.
_MAX_ENVIRONMENT = 1 << 17

# What a shell has to come back after its command was killed, before it is killed too.
_GRACE_S = 0.5
_SWEEP_S = 0.005


class Session:
    """A shell that reads its commands from one pipe and tells their status on another.

    Neither is a command's standard input or output, nor open in a command; so no output can be
    taken for a status, and no command eats the next one.
    """

    def __init__(
        self,
        pool: Pool,
        env: Mapping[str, str],
        cwd: str,
        prelude: str,
        *,
        keep: int,
    ) -> None:
        """Starts the shell; `on_over`, when set, hears of its end.

        Raises:
            OSError: there is no room for it.
        """
        self._loop = pool.loop
        self.on_over: Callable[[], None] = lambda: None
        self._prelude = prelude
        self.over = False
        self._unwritten = b""
        self._status_line = b""
        self._on_status: Callable[[int | None], None] | None = None
        # While the shell is asked for its environment: who hears it, and what has come of it.
        self._on_told: Callable[[bytes], None] | None = None
        self._told = b""
        self.env = env
        self._deadline: Timer | None = None
        self._next_sweep: Timer | None = None
        self.timed_out = False
        argv = next((s for s in _SHELLS if os.access(s[0], os.X_OK)), _SHELLS[-1])
        with ExitStack() as theirs, ExitStack() as ours:
            null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            theirs.callback(os.close, null)
            script_end, self._script = os.pipe2(os.O_CLOEXEC)
            theirs.callback(os.close, script_end)
            ours.callback(os.close, self._script)
            self._control, status_end = os.pipe2(os.O_CLOEXEC)
            theirs.callback(os.close, status_end)
            ours.callback(os.close, self._control)
            os.set_blocking(self._script, False)
            os.set_blocking(self._control, False)
            more = (script_end, status_end)
            self.job = Job(pool, argv, env, cwd, null, keep=keep, on_end=self._end, more=more)
            ours.pop_all()
        self._loop.watch(self._control, self._status_readable)

    @property
    def busy(self) -> bool:
        """Whether a command runs."""
        return self._on_status is not None

    @property
    def shell(self) -> int | None:
        """The process of the shell."""
        above = self.job.supervisor.pid
        children = [(p.started, pid) for pid, p in processes.table().items() if p.parent == above]
        # The shell is its supervisor's first child; orphans come later.
        return min(children)[1] if children else None

    def tell(self, on_told: Callable[[bytes], None]) -> None:
        """Asks the shell for its environment; it may never answer.

        Args:
            on_told: Hears `NAME=value` texts, each ended by a NUL; nothing if it is too large.
        """
        self._on_told, self._told = on_told, b"\0"
        self._unwritten += _TELL.encode()
        self._write()

    @property
    def is_asked(self) -> bool:
        """Whether the shell still owes the answer to `tell`."""
        return self._on_told is not None

    def run(
        self, command: str, timeout_s: float | None, on_status: Callable[[int | None], None]
    ) -> None:
        """Runs a command; `on_status` hears its exit status, or None if it was killed."""
        self._on_status = on_status
        self.timed_out = False
        self._began = _ticks()
        if timeout_s is not None:
            self._deadline = self._loop.later(timeout_s, self._time_out)
        text = _SCRIPT.format(self._prelude, command, os.urandom(8).hex(), _RETURN)
        self._prelude = ""
        self._unwritten += text.encode("utf-8", "surrogateescape")
        self._write()

    def _write(self) -> None:
        try:
            written = os.write(self._script, self._unwritten)
        except BlockingIOError:
            written = 0
        except BrokenPipeError:
            written = len(self._unwritten)  # The shell has ended, and `_end` follows.
        self._unwritten = self._unwritten[written:]
        if self._unwritten:
            self._loop.watch(self._script, self._write, WRITE)
        else:
            self._loop.unwatch(self._script)

    def _status_readable(self) -> None:
        data = read_some(self._control)
        if data == b"":
            self._loop.unwatch(self._control)
        # A command cannot write here, but another process of its user may, through /proc.
        if self._on_told is not None:
            data = self._take_told(data or b"")
        self._status_line = (self._status_line + (data or b""))[-32:]
        if self._status_line.endswith(b"\n"):
            line = self._status_line.split()[-1:]
            self._status_line = b""
            if self.busy:
                status = int(line[0]) if line and line[0].isdigit() else 256
                self._tell(status if status < 256 else None)

    def _take_told(self, data: bytes) -> bytes:
        """Takes what belongs to the answer to `tell`; returns what follows it."""
        assert self._on_told is not None
        self._told = (self._told + data)[-_MAX_ENVIRONMENT:]
        told, end, rest = self._told.partition(_TOLD)
        if not end:
            return b""
        on_told, self._on_told = self._on_told, None
        # One that was cut begins with anything but the NUL that was put there.
        on_told(told[1:] + b"\0" if told[:1] == b"\0" else b"")
        return rest

    def _tell(self, status: int | None) -> None:
        for timer in (self._deadline, self._next_sweep):
            if timer is not None:
                timer.cancel()
        on_status, self._on_status = self._on_status, None
        if not self.over:
            self.job.out.drain()
            self.job.err.drain()
        if on_status is not None:
            on_status(None if self.timed_out else status)

    def _time_out(self) -> None:
        self.timed_out = True
        self.interrupt()

    def interrupt(self) -> None:
        """Kills what the running command started, and the shell if that does not free it."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self._loop.later(_GRACE_S, self.job.kill)
        self._sweep()

    def _sweep(self) -> None:
        shell = self.shell
        if shell is not None:
            with suppress(ProcessLookupError):
                os.kill(shell, _RETURN)
            processes.kill(lambda: self._branches(shell))
        self._next_sweep = self._loop.later(_SWEEP_S, self._sweep)

    def _branches(self, shell: int) -> set[int]:
        """What the command has started, with all below it; jobs of earlier commands are spared."""
        table = processes.table()
        above = (shell, self.job.supervisor.pid)
        heads = {
            pid
            for pid, process in table.items()
            if process.parent in above and process.started >= self._began and pid != shell
        }
        return heads | processes.below(heads, table)

    def close(self) -> None:
        """Kills the shell with everything in the session."""
        self.job.kill()

    def _end(self, outcome: Outcome) -> None:
        self.over = True
        for fd in (self._script, self._control):
            self._loop.unwatch(fd)
            with suppress(OSError):
                os.close(fd)
        if self.busy:
            self._tell(outcome.status)
        if self._on_told is not None:
            self._on_told(b"")
        self.on_over()


def _ticks() -> int:
    """The clock tick since boot that it is now, as /proc tells when processes started."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
