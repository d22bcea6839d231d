"""The client: one connection pool, sandboxes as objects, errors as exceptions."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import secrets
import tarfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from sandbox.api import (
    EndRequest,
    Event,
    ExecRequest,
    ExecResult,
    RunRequest,
    SandboxInfo,
    SessionRequest,
    SessionResult,
    SnapshotInfo,
    check_session,
    new_operation,
    parse,
    to_json,
)
from sandbox.errors import (
    SandboxEgressDown,
    SandboxEnded,
    SandboxError,
    SandboxFileMissing,
    SandboxGated,
    SandboxGone,
    SandboxLost,
    SandboxPaused,
    SandboxRefused,
    SandboxSessionEnded,
    SandboxSnapshotDamaged,
    SandboxSnapshotMissing,
    SandboxTooLarge,
    SandboxUnauthorised,
    SandboxUnavailable,
    SandboxUnfinished,
)
from sandbox.spec import Egress, Gates, Limits, SandboxSpec, new_id
from sandbox.transport import OnOutput, Transport

__all__ = [
    "Egress",
    "Event",
    "ExecResult",
    "Gates",
    "Limits",
    "Sandbox",
    "SandboxClient",
    "SandboxEgressDown",
    "SandboxEnded",
    "SandboxError",
    "SandboxFileMissing",
    "SandboxGated",
    "SandboxGone",
    "SandboxInfo",
    "SandboxLost",
    "SandboxPaused",
    "SandboxRefused",
    "SandboxSessionEnded",
    "SandboxSnapshotDamaged",
    "SandboxSnapshotMissing",
    "SandboxSpec",
    "SandboxTooLarge",
    "SandboxUnauthorised",
    "SandboxUnavailable",
    "SandboxUnfinished",
    "Session",
    "SessionResult",
    "SnapshotInfo",
    "tar_of",
]

# Past a command's own deadline: time to kill it and to answer.
_GRACE_S = 60.0

# Between two tries to reach a service that is expected back, and how long one may take that reaches
# nobody.
_RETRY_S, _IN_VAIN_S = 0.1, 11.0

T = TypeVar("T")

# Between two questions whether a paused sandbox was resumed.
_PAUSED_S = 1.0


class SandboxClient:
    """A sandbox service; open it with `async with`.

    Every method raises a `SandboxError`: `SandboxRefused` for bad input, `SandboxGone` for a
    sandbox that is no more, `SandboxUnavailable` when the service does not answer.
    """

    def __init__(
        self, base_url: str, token: str | None = None, *, reconnect_s: float = 0.0
    ) -> None:
        """Describes the service; nothing connects before the first request.

        Args:
            base_url: Where it serves.
            token: Bearer token that it asks for.
            reconnect_s: Seconds to go on asking when the service does not answer, for all that
                may be asked twice: one that was killed and started again still has the results
                of commands. At 0 a command ends with its connection.
        """
        self._transport = Transport(base_url, token)
        self.base_url = self._transport.base_url
        self._request = self._transport.request
        self._reconnect_s = reconnect_s

    async def __aenter__(self) -> Self:
        """Opens the connection pool."""
        self._transport.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the connection pool."""
        await self.close()

    async def close(self) -> None:
        """Closes the connection pool; sandboxes live on."""
        await self._transport.close()

    async def health(self) -> dict[str, Any]:
        """What the service says of itself."""
        answer: dict[str, Any] = json.loads(await self._request("GET", "/health"))
        return answer

    async def create(self, spec: SandboxSpec | None = None) -> Sandbox:
        """Makes a sandbox; without a spec, one with the default limits."""
        path = f"/sandboxes/{new_id()}"
        body = json.dumps(to_json(spec or SandboxSpec())).encode()
        try:
            answer = await self._insist(lambda: self._request("PUT", path, body))
        except asyncio.CancelledError:
            # The service may have made it already, and nobody else knows its id.
            with contextlib.suppress(SandboxError):
                await asyncio.shield(self._request("DELETE", path, timeout_s=_GRACE_S))
            raise
        return Sandbox(self, parse(SandboxInfo, answer))

    async def attach(self, sandbox_id: str) -> Sandbox:
        """A sandbox that was created earlier, perhaps by another process."""
        answer = await self._insist(lambda: self._request("GET", f"/sandboxes/{sandbox_id}"))
        return Sandbox(self, parse(SandboxInfo, answer))

    async def list(self) -> list[SandboxInfo]:
        """Every sandbox of the service."""
        answer = json.loads(await self._request("GET", "/sandboxes"))
        return [parse(SandboxInfo, json.dumps(info)) for info in answer["sandboxes"]]

    async def usage(self) -> dict[str, dict[str, Any]]:
        """What each sandbox takes of the service's host now, by id.

        A `state` (idle, busy, paused or lost), `processes`, and their `memory_bytes`.
        """
        answer: dict[str, dict[str, Any]] = json.loads(await self._request("GET", "/usage"))
        return answer["usage"]

    async def log(self, sandbox_id: str, *, after: int = 0) -> Sequence[Event]:
        """What was done to a sandbox, and in it, also when it is no more; up to 1000 events.

        Args:
            sandbox_id: Which one.
            after: Number of the last event already seen.

        Raises:
            SandboxGone: the log never had it, or no more.
        """
        path, query = f"/sandboxes/{sandbox_id}/log", {"after": str(after)}
        answer = json.loads(await self._request("GET", path, query=query))
        return [Event(**event) for event in answer["events"]]

    async def snapshots(self) -> Sequence[SnapshotInfo]:
        """Every snapshot that the service keeps, the latest last."""
        answer = json.loads(await self._request("GET", "/snapshots"))
        return [parse(SnapshotInfo, json.dumps(info)) for info in answer["snapshots"]]

    async def delete_snapshot(self, digest: str) -> None:
        """Deletes a snapshot, and the bytes that no other has.

        Raises:
            SandboxSnapshotMissing: there is none of that digest.
        """
        await self._request("DELETE", f"/snapshots/{digest}")

    async def _command(
        self,
        method: str,
        path: str,
        request: ExecRequest | SessionRequest | RunRequest | EndRequest,
        sandbox: Sandbox,
        *,
        timeout_s: float,
        on_output: OnOutput | None = None,
    ) -> bytes:
        """Sends a command; asks again for its result if this client reconnects."""
        send = self._request if on_output is None else partial(self._transport.stream, on_output)
        if self._reconnect_s <= 0 and request.operation is None:
            body = json.dumps(to_json(request)).encode()
            return await send(method, path, body, timeout_s=timeout_s)
        operation = request.operation or new_operation()
        arrived = tuple(sandbox._arrived)
        request = dataclasses.replace(request, operation=operation, acknowledge=arrived)
        body = json.dumps(to_json(request)).encode()
        try:
            answer = await self._insist(
                lambda: send(method, path, body, timeout_s=timeout_s), goes_on=True
            )
        except asyncio.CancelledError:
            with contextlib.suppress(SandboxError):
                undo = f"{sandbox._path}/operations/{operation}"
                await asyncio.shield(self._request("DELETE", undo, timeout_s=_GRACE_S))
            raise
        sandbox._arrived = [o for o in sandbox._arrived if o not in arrived]
        sandbox._arrived.append(operation)
        return answer

    async def _insist(self, send: Callable[[], Awaitable[T]], *, goes_on: bool = False) -> T:
        """Sends what may be sent twice, again as long as the service is expected back.

        Args:
            send: Sends it.
            goes_on: Whether it is a command, which a sandbox that is paused goes on with later.
        """
        loop = asyncio.get_running_loop()
        deadline: float | None = None
        asked_before = False
        while True:
            began = loop.time()
            try:
                return await send()
            except SandboxUnavailable:
                now = loop.time()
                # A service that was there, busy with a command perhaps, is missed from now on.
                if deadline is None or now > began + _IN_VAIN_S:
                    deadline = now + self._reconnect_s
                if now >= deadline:
                    raise
                await asyncio.sleep(_RETRY_S)
                asked_before = True
            except SandboxPaused:
                if not (asked_before and goes_on):
                    raise
                # It began before the pause and goes on after it.
                await asyncio.sleep(_PAUSED_S)
                deadline = None


class Sandbox:
    """One sandbox; leaving its `async with` removes it."""

    def __init__(self, client: SandboxClient, info: SandboxInfo) -> None:
        """Wraps a sandbox that exists."""
        self.info = info
        self._client = client
        self._path = f"/sandboxes/{info.id}"
        # Operations whose results are here and still kept by the sandbox.
        self._arrived: list[str] = []

    @property
    def id(self) -> str:
        """The sandbox's id, for `SandboxClient.attach`."""
        return self.info.id

    async def __aenter__(self) -> Self:
        """The sandbox itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes the sandbox."""
        await self.close()

    async def exec(
        self,
        command: str,
        *,
        timeout_s: float = 60.0,
        cwd: str = ".",
        env: Mapping[str, str] | None = None,
        stdin: str = "",
        output_bytes: int | None = None,
        on_output: OnOutput | None = None,
        operation: str | None = None,
    ) -> ExecResult:
        """Runs `sh -c command` in the workspace; what it leaves running is killed with it.

        Args:
            command: Shell text.
            timeout_s: Seconds until it is killed; the result then says `timed_out`.
            cwd: Directory relative to the workspace.
            env: Variables on top of the sandbox's.
            stdin: Text on standard input.
            output_bytes: Bytes kept of each stream; None is the sandbox's limit.
            on_output: Called with "stdout" or "stderr" and text as it is printed, up to half of
                `output_bytes` of each stream. The result holds it all the same.
            operation: Id of the caller's own for this command, of 8 to 64 letters, digits and
                `-`. Who asks again with it, be it another process, gets the result of the one
                run. None makes one up.

        Returns:
            The result, whatever the exit code: a failing command is no error.
        """
        request = ExecRequest(
            command=command,
            timeout_s=timeout_s,
            cwd=cwd,
            env=env or {},
            stdin=stdin,
            output_bytes=output_bytes,
            operation=operation,
        )
        answer = await self._client._command(
            "POST",
            f"{self._path}/exec",
            request,
            self,
            timeout_s=timeout_s + _GRACE_S,
            on_output=on_output,
        )
        # The service is trusted and this is the hot path: no validation.
        return ExecResult(**json.loads(answer))

    async def session(
        self, name: str | None = None, *, cwd: str = ".", env: Mapping[str, str] | None = None
    ) -> Session:
        """Starts a shell that keeps its directory, variables and jobs between commands.

        Args:
            name: Of the session, for `attach_session`; None chooses one.
            cwd: Directory relative to the workspace that it starts in.
            env: Variables on top of the sandbox's.
        """
        session = Session(self, name or f"s-{secrets.token_hex(6)}")
        request = SessionRequest(cwd=cwd, env=env or {})
        await self._client._command("PUT", session._path, request, self, timeout_s=_GRACE_S)
        return session

    def attach_session(self, name: str) -> Session:
        """A session that was started earlier, perhaps by another process."""
        return Session(self, name)

    async def write(self, path: str, data: bytes | str) -> None:
        """Replaces one file, with the directories above it; text is written as UTF-8."""
        body = data.encode() if isinstance(data, str) else data
        await self._again("PUT", f"{self._path}/files", body, query={"path": path})

    async def read(self, path: str) -> bytes:
        """The bytes of one regular file.

        Raises:
            SandboxFileMissing: there is no such file.
            SandboxRefused: it is no regular file, or lies outside of the workspace.
        """
        return await self._again("GET", f"{self._path}/files", query={"path": path})

    async def upload_tree(self, tree: bytes | Mapping[str, bytes | str]) -> None:
        """Writes an uncompressed tar, or files by path, over the workspace."""
        body = tree if isinstance(tree, bytes) else tar_of(tree)
        await self._again("PUT", f"{self._path}/archive", body)

    async def download_tree(self) -> bytes:
        """The workspace as a tar: equal trees give equal bytes."""
        return await self._again("GET", f"{self._path}/archive")

    async def pause(self) -> None:
        """Stops everything in the sandbox, running commands too, until `resume`.

        Meanwhile every other request but `snapshot` and `close` raises `SandboxPaused`. The time
        limits of commands stand still, `lifetime_s` does not, and the sandbox counts as in use.
        A caller that waits for a command gives up a minute after the command's limit all the
        same, unless its client reconnects.

        Raises:
            SandboxRefused: the service cannot stop a sandbox.
        """
        self.info = parse(SandboxInfo, await self._client._request("POST", f"{self._path}/pause"))

    async def resume(self) -> None:
        """Lets everything in a paused sandbox run on."""
        self.info = parse(SandboxInfo, await self._client._request("POST", f"{self._path}/resume"))

    async def snapshot(self) -> SnapshotInfo:
        """Keeps workspace, home and sessions, for `SandboxSpec(snapshot=info.digest)`.

        A sandbox made with it has the files, and for each session a shell of the same name with
        its directory and exported environment. Processes, shell variables that are not exported,
        /tmp, pipes and sockets are lost. Sandboxes with equal files and sessions have equal
        digests.

        Raises:
            SandboxTooLarge: it holds more than the larger of `limits.files_mb` and `disk_mb`.
        """
        answer = await self._client._request("POST", f"{self._path}/snapshots")
        return parse(SnapshotInfo, answer)

    async def arm(self, gates: Gates) -> None:
        """Sets what must come before work and before the end; for good, and for every caller.

        Until the reading is taken, commands, sessions and writes raise `SandboxGated`.
        """
        body = json.dumps(to_json(gates)).encode()
        await self._client._request("PUT", f"{self._path}/gates", body)

    async def take_part(self, number: int) -> str:
        """A text of the gates' reading, by its number from 1, which is read by that."""
        answer = await self._client._request("POST", f"{self._path}/reading/{number}")
        text: str = json.loads(answer)["text"]
        return text

    async def end(self, *, timeout_s: float = 60.0) -> ExecResult | None:
        """Ends the work: what runs is killed, and files can be read, not written, from then on.

        Args:
            timeout_s: Seconds that the gates' finish check may take.

        Returns:
            How the finish check ended; None without one, or if the work has ended before.

        Raises:
            SandboxGated: there is something to read yet.
            SandboxUnfinished: the finish check fails; its result is in `facts["check"]`.
        """
        answer = await self._client._command(
            "POST",
            f"{self._path}/end",
            EndRequest(timeout_s=timeout_s),
            self,
            timeout_s=timeout_s + _GRACE_S,
        )
        check = json.loads(answer)["check"]
        return None if check is None else ExecResult(**check)

    async def close(self) -> None:
        """Removes the sandbox; one already gone is no error."""
        await self._again("DELETE", self._path)

    async def _again(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        query: Mapping[str, str] | None = None,
    ) -> bytes:
        client = self._client
        return await client._insist(lambda: client._request(method, path, body, query=query))


class Session:
    """One shell in a sandbox; leaving its `async with` ends it with all that runs in it."""

    def __init__(self, sandbox: Sandbox, name: str) -> None:
        """Wraps a session that exists."""
        check_session(name)
        self.name = name
        self._sandbox = sandbox
        self._path = f"{sandbox._path}/sessions/{name}"

    async def __aenter__(self) -> Self:
        """The session itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the session."""
        await self.close()

    async def run(
        self,
        command: str,
        *,
        timeout_s: float = 60.0,
        on_output: OnOutput | None = None,
        operation: str | None = None,
    ) -> SessionResult:
        """Runs a command in the shell; its directory, variables and background jobs last.

        Args:
            command: Shell text; its standard input is empty.
            timeout_s: Seconds until what it started is killed; the result then says `timed_out`,
                and `ended` if the shell had to be killed with it.
            on_output: As in `Sandbox.exec`.
            operation: As in `Sandbox.exec`.

        Raises:
            SandboxSessionEnded: the shell has ended, or was never started.
        """
        answer = await self._sandbox._client._command(
            "POST",
            self._path,
            RunRequest(command=command, timeout_s=timeout_s, operation=operation),
            self._sandbox,
            timeout_s=timeout_s + _GRACE_S,
            on_output=on_output,
        )
        return SessionResult(**json.loads(answer))

    async def close(self) -> None:
        """Ends the session; one already over is no error."""
        await self._sandbox._again("DELETE", self._path)


def tar_of(files: Mapping[str, bytes | str]) -> bytes:
    """An uncompressed tar of files by path; text is written as UTF-8."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path, content in sorted(files.items()):
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()
