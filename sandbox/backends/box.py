"""One sandbox of a backend: what is asked of its agent, and how it stands still."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sandbox.api import (
    ExecRequest,
    ExecResult,
    RunRequest,
    SandboxInfo,
    SessionRequest,
    SessionResult,
)
from sandbox.errors import (
    SandboxGone,
    SandboxLost,
    SandboxRefused,
)
from sandbox.files import Files
from sandbox.link import GRACE_S, Answer, Link, OnOutput
from sandbox.look import MAX_BYTES as MAX_LOOK
from sandbox.look import Look, Shell, inside, read_look
from sandbox.output import text_of
from sandbox.spec import Limits
from sandbox.tree import Tree
from sandbox.workspace import split_path

# The agent ends a sandbox that its service should have ended this long ago.
LATE_S = 2.0


@dataclass(frozen=True)
class Freezer:
    """Stops all processes of a sandbox, its agent's too, and lets them run again.

    Attributes:
        freeze: Returns once all stand still; those that do already are no error.
        thaw: The reverse; those that run, or are gone, are no error.
    """

    freeze: Callable[[], Awaitable[None]]
    thaw: Callable[[], Awaitable[None]]


class Box:
    """One sandbox of a backend."""

    def __init__(
        self,
        info: SandboxInfo,
        workspace: Files,
        link: Link,
        *,
        close: Callable[[], Awaitable[None]],
        root: str = "/workspace",
        prelude: str = "",
        freezer: Freezer | None = None,
        tree: Tree | None = None,
        places: Mapping[str, str] | None = None,
    ) -> None:
        """Wraps a sandbox whose agent has dialled, or will when it is resumed.

        Args:
            info: What its callers see.
            workspace: The files that its commands see as their working directory.
            link: The line to its agent.
            close: Kills what runs and removes everything.
            root: The workspace's path inside.
            prelude: Shell text before every command, such as resource limits.
            freezer: None if it cannot be paused.
            tree: The files of a snapshot; None if there can be none.
            places: Paths inside that differ from an isolated sandbox's, by those.
        """
        self.info, self.workspace, self.link = info, workspace, link
        self.freezer, self.tree = freezer, tree
        self._close, self._root, self._prelude = close, root, prelude
        # Variables of every command, below those of the spec.
        self.env: Mapping[str, str] = {}
        self._threads = _thread_variables(info.spec.limits)
        self._places = places or {}
        # Who wants it to stand still: its owner, a snapshot.
        self._holds = 1 if info.paused_at is not None else 0
        self._freezing = asyncio.Lock()
        self.is_closed = False

    @property
    def _env(self) -> dict[str, str]:
        """Variables of every command and session."""
        return {**self._threads, **self.env, **self.info.spec.env}

    async def exec(self, request: ExecRequest, on_output: OnOutput | None = None) -> ExecResult:
        """Runs one command; everything it started is dead when this returns or is cancelled."""
        argv = ["/bin/sh", "-c", request.command]
        if self._prelude:
            argv = ["/bin/sh", "-c", f'{self._prelude}eval "$1"', "sh", request.command]
        header = {
            "op": "exec",
            "argv": argv,
            "env": {**self._env, **request.env},
            "cwd": await self._cwd(request.cwd),
            "timeout": request.timeout_s,
            "keep": request.output_bytes or self.info.spec.limits.output_bytes,
        }
        stdin = request.stdin.encode()
        answer = await self._call(header, request, stdin, request.timeout_s, on_output)
        return ExecResult(**_command(answer))

    async def open_session(self, name: str, request: SessionRequest) -> None:
        """Starts a shell that lives until it is closed."""
        header = {
            "op": "open",
            "session": name,
            "env": {**self._env, **request.env},
            "cwd": await self._cwd(request.cwd),
            "prelude": self._prelude,
            "keep": self.info.spec.limits.output_bytes,
        }
        await self._call(header, request)

    async def run(
        self, name: str, request: RunRequest, on_output: OnOutput | None = None
    ) -> SessionResult:
        """Runs a command in a session's shell."""
        header = {"op": "run", "session": name, "timeout": request.timeout_s}
        text = request.command.encode()
        answer = await self._call(header, request, text, request.timeout_s, on_output)
        return SessionResult(**_command(answer), ended=answer[0].get("ended") is True)

    async def close_session(self, name: str) -> None:
        """Ends a session with everything in it; one that is not there is no error."""
        await self.link.call({"op": "close", "session": name}, timeout_s=GRACE_S)

    async def look(self) -> Look:
        """What runs now; sessions whose shells are busy do not tell all."""
        header = {"op": "look", "env": self._env, "limit": MAX_LOOK // 2}
        return read_look(*await self.link.call(header, timeout_s=GRACE_S), self._places)

    async def replay(self, shell: Shell) -> None:
        """Starts a session of a snapshot; one whose directory is not there, in the workspace."""
        header = {
            "op": "open",
            "session": shell.name,
            "env": self._env,
            "prelude": self._prelude,
            "keep": self.info.spec.limits.output_bytes,
        }
        rest = json.dumps({"env": dict(shell.env), "unset": list(shell.unset)}).encode()
        try:
            cwd = os.fsencode(inside(shell.cwd, self._places)).decode()
            await self.link.call({**header, "cwd": cwd}, rest, timeout_s=GRACE_S)
        except (SandboxRefused, UnicodeError):
            await self.link.call({**header, "cwd": self._root}, rest, timeout_s=GRACE_S)

    async def freeze(self) -> None:
        """Stops all processes until each `freeze` has had its `thaw`.

        Raises:
            SandboxRefused: this backend cannot.
            SandboxGone: it is being closed.
        """
        if self.freezer is None:
            raise SandboxRefused(
                "pause: this service cannot stop a sandbox; it takes Docker, or control groups of "
                "this host, which a service that is not root may lack (see `limits` of /health)."
            )
        async with self._freezing:
            gone = SandboxGone(f"sandbox {self.info.id} was closed meanwhile.")
            if self.is_closed:
                raise gone
            if self._holds == 0:
                self.link.hold()
                try:
                    await self.freezer.freeze()
                except BaseException:
                    self.link.release()
                    await asyncio.shield(self.freezer.thaw())
                    if self.is_closed:  # Its agent was told to end.
                        raise gone from None
                    raise
            self._holds += 1

    async def thaw(self) -> None:
        """Undoes one `freeze`; waits for the agent if it has not dialled since."""
        async with self._freezing:
            self._holds -= 1
            if self._holds > 0 or self.is_closed or self.freezer is None:
                return
            self.link.release()
            try:
                await self.freezer.thaw()
            except BaseException:
                # It stands still yet.
                self._holds += 1
                self.link.hold()
                raise
        try:
            async with asyncio.timeout(GRACE_S):
                await self.link.dialled()
        except TimeoutError:
            self.link.fail(SandboxLost("the agent inside the sandbox does not come back."))

    async def halt(self) -> None:
        """Kills whatever runs, sessions too; the sandbox goes on."""
        await self.link.call({"op": "halt"}, timeout_s=GRACE_S)

    async def assign(self, info: SandboxInfo) -> None:
        """Gives a sandbox that was made for nobody to a caller, and it its lifetime."""
        lifetime_s = info.spec.lifetime_s + LATE_S
        await self.link.call({"op": "live", "lifetime": lifetime_s}, timeout_s=GRACE_S)
        self.info = info

    async def close(self) -> None:
        """Kills what runs and removes everything; called once.

        What waits for a command hears `SandboxGone`.
        """
        self.is_closed = True
        self.link.end()
        self.link.fail(SandboxGone(f"sandbox {self.info.id} was closed meanwhile."))
        async with self._freezing:
            await self._close()

    async def _cwd(self, path: str) -> str:
        await self.workspace.check_directory(path)
        return "/".join([self._root, *split_path(path)])

    async def _call(
        self,
        header: dict[str, Any],
        request: ExecRequest | SessionRequest | RunRequest,
        payload: bytes = b"",
        timeout_s: float = 0.0,
        on_output: OnOutput | None = None,
    ) -> Answer:
        keep = request.operation is not None
        if keep:
            header["id"] = request.operation
        if request.acknowledge:
            header["ack"] = list(request.acknowledge)
        return await self.link.call(
            header, payload, timeout_s=timeout_s + GRACE_S, keep=keep, on_output=on_output
        )


def _thread_variables(limits: Limits) -> dict[str, str]:
    """Tells libraries how many threads suit a sandbox.

    They count the host's cores, not those that they may use: on a host of many, one import of
    numpy and scipy would fill `limits.pids` with idle threads.
    """
    threads = str(math.ceil(limits.cpus))
    return {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}


def _command(answer: Answer) -> dict[str, Any]:
    """The fields of a result, from an agent that may say anything."""
    header, data = answer
    try:
        streams = []
        place = 0
        for name in ("out", "err"):
            head, tail, total = (int(size) for size in header[name])
            middle, end = place + head, place + head + tail
            if min(head, tail) < 0 or not end <= len(data) or not head + tail <= total < 1 << 63:
                raise ValueError(name)
            streams.append((bytes(data[place:middle]), bytes(data[middle:end]), total))
            place = end
        timed_out = header.get("timed_out") is True
        code = header["exit"]
        if not (code is None or (type(code) is int and 0 <= code <= 255)):
            raise ValueError(code)
        duration_s = float(header["duration"])
        if not math.isfinite(duration_s):
            raise ValueError(duration_s)
        return {
            "exit_code": None if timed_out else 137 if code is None else code,
            "stdout": text_of(*streams[0]),
            "stderr": text_of(*streams[1]),
            "timed_out": timed_out,
            "duration_s": duration_s,
            "stdout_bytes": streams[0][2],
            "stderr_bytes": streams[1][2],
        }
    except (KeyError, TypeError, ValueError, OverflowError):
        raise SandboxLost("the agent inside the sandbox sent a result that is none.") from None
