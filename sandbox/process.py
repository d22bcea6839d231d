"""Runs one host process with a deadline, bounded output and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sandbox.api import ExecResult
from sandbox.output import HeadTail

_CHUNK = 1 << 16
_DRAIN_S = 2.0

# Called with the process id, and whether the process ended by itself.
Sweep = Callable[[int, bool], Awaitable[None]]


@dataclass(frozen=True)
class Command:
    """A host process to run; `sweep` kills what it leaves behind once it has ended."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    stdin: bytes
    timeout_s: float
    output_bytes: int
    sweep: Sweep


async def run(command: Command) -> ExecResult:
    """Runs it to its end or its deadline; being cancelled kills it too.

    asyncio's own subprocesses cost a thread a child on Python 3.11 and buffer without a bound;
    a pidfd and two pipe readers on the running loop do neither.
    """
    loop = asyncio.get_running_loop()
    started = time.monotonic()
    process = _spawn(command)
    assert process.stdout is not None and process.stderr is not None
    pidfd = os.pidfd_open(process.pid)
    ended = loop.create_future()
    loop.add_reader(pidfd, _once, loop, pidfd, ended)
    out = _Reader(process.stdout.fileno(), command.output_bytes)
    err = _Reader(process.stderr.fileno(), command.output_bytes)
    timed_out = False
    try:
        try:
            async with asyncio.timeout(command.timeout_s):
                await asyncio.shield(ended)
        except TimeoutError:
            timed_out = not ended.done()
        finally:
            by_itself = ended.done()
            process.kill()
            await ended
            await command.sweep(process.pid, by_itself)
        # Whoever holds the pipes is dead or dying, so their ends are near.
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                await out.closed
                await err.closed
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        for reader, pipe in ((out, process.stdout), (err, process.stderr)):
            reader.stop()
            pipe.close()
        code = process.wait()
    return ExecResult(
        exit_code=None if timed_out else code if code >= 0 else 128 - code,
        stdout=out.kept.text(),
        stderr=err.kept.text(),
        timed_out=timed_out,
        duration_s=time.monotonic() - started,
        stdout_bytes=out.kept.total,
        stderr_bytes=err.kept.total,
    )


def _spawn(command: Command) -> subprocess.Popen[bytes]:
    # No preexec_fn, user or group argument: those make CPython fork instead of vfork.
    stdin = subprocess.DEVNULL
    if command.stdin:
        stdin = os.memfd_create("stdin", os.MFD_CLOEXEC)
        with open(stdin, "wb", closefd=False) as file:
            file.write(command.stdin)
        os.lseek(stdin, 0, os.SEEK_SET)
    try:
        return subprocess.Popen(
            command.argv,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=command.cwd,
            env=command.env,
            bufsize=0,
            start_new_session=True,
        )
    finally:
        if stdin >= 0:
            os.close(stdin)


def _once(loop: asyncio.AbstractEventLoop, fd: int, future: asyncio.Future[None]) -> None:
    loop.remove_reader(fd)
    if not future.done():
        future.set_result(None)


class _Reader:
    """Feeds what a pipe gives to a `HeadTail` whenever the loop sees that it is readable."""

    def __init__(self, fd: int, limit: int) -> None:
        self.kept = HeadTail(limit)
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._fd = fd
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return
        if data:
            self.kept.feed(data)
        else:
            self.stop()

    def stop(self) -> None:
        self._loop.remove_reader(self._fd)
        if not self.closed.done():
            self.closed.set_result(None)
