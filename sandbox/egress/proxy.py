"""The engine's life, as the service sees it: one process for all sandboxes, started when asked for.

An engine that dies is started again, and opens again what it had. Orders are objects of JSON, a
line each: `{"do": "open", "sandbox", "policy"}`, which comes with the socket that it is to serve,
and `{"do": "close", "sandbox"}`, with a `number` that the answer, `{"done": number}`, repeats. The
engine also tells of its verdicts. The sockets stay open here, so that connections made while an
engine starts wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import socket
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.backends.base import LINE_DIR
from sandbox.backends.box import Box
from sandbox.dialled import DialledLink, listen
from sandbox.egress import engine_path, install
from sandbox.egress.settings import CERTIFICATE, EgressSettings
from sandbox.errors import SandboxEgressDown, SandboxRefused
from sandbox.spec import Isolation, SandboxSpec

log = logging.getLogger("sandbox")

_START_S, _ORDER_S = 60.0, 10.0
# After a death; and after a start that failed.
_AGAIN_S, _LATER_S = 0.1, 10.0
_MAX_LINE = 1 << 24
_SOCKET = "egress.sock"


@dataclass
class _Exit:
    """The way out of one sandbox."""

    box: Box
    policy: dict[str, Any]
    listener: socket.socket
    is_open: bool = False


class EgressProxy:
    """The way out of a service's sandboxes."""

    def __init__(
        self,
        settings: EgressSettings,
        directory: Callable[[], Path],
        *,
        on_verdicts: Callable[[str, str, int], None],
        on_event: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """Prepares it; nothing runs before a sandbox asks.

        Args:
            settings: The operator's.
            directory: Where the engine's authority and its audit are, once the backend has begun.
            on_verdicts: Hears verdict, reason and how many more of them.
            on_event: Hears of single requests, by sandbox.
        """
        self._directory = directory
        self._settings, self._on_verdicts, self._on_event = settings, on_verdicts, on_event
        self._exits: dict[str, _Exit] = {}
        self._orders: socket.socket | None = None
        self._sending = asyncio.Lock()
        self._engine: Process | None = None
        self._certificate = ""
        self._numbers = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._starting = asyncio.Lock()
        self._listening: asyncio.Task[None] | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._shut = False

    def health(self) -> str:
        """Whether egress can be had, and if not why."""
        if self._engine is not None:
            return "runs"
        problem = self._problem()
        return "starts when asked for" if problem is None else f"none: {problem}"

    def _problem(self) -> str | None:
        if self._settings.python is None and not install.is_complete():
            return f"mitmproxy is not installed; {install.REMEDY}"
        if self._settings.python is not None and not os.access(self._settings.python, os.X_OK):
            return f"{self._settings.python} is no interpreter; set another python in its settings"
        return None

    async def check(self, spec: SandboxSpec, isolation: Isolation) -> None:
        """Has the engine ready before a sandbox is made that asks for egress.

        Raises:
            SandboxRefused: the spec contradicts itself, or nothing would hold commands to it.
            SandboxEgressDown: there is no engine.
        """
        if spec.egress is None:
            return
        if spec.network:
            raise SandboxRefused("egress: means nothing beside network=True; choose one of them.")
        if isolation == "none":
            raise SandboxRefused(
                "egress: plain processes have the host's network; serve with isolation."
            )
        if isolation == "kubernetes":
            raise SandboxRefused("egress: the proxy does not reach pods; ask for none.")
        await self.ready()

    async def ready(self) -> None:
        """Starts the engine if none runs.

        Raises:
            SandboxEgressDown: it does not start.
        """
        if self._engine is None:
            async with self._starting:
                if self._engine is None:
                    await self._start(self._directory())

    async def ready_for(self, sandbox_id: str) -> None:
        """Starts the engine if none runs, and opens a sandbox's way out if it is shut.

        Raises:
            SandboxEgressDown: either fails.
        """
        await self.ready()
        way_out = self._exits.get(sandbox_id)
        if way_out is not None and not way_out.is_open:
            await self._open(way_out)

    async def attach(self, box: Box) -> None:
        """Lets a sandbox out, now or once there is an engine, and tells its commands how.

        Raises:
            SandboxEgressDown: there is no engine now.
        """
        egress = box.info.spec.egress
        assert egress is not None
        box.env = self._settings.environment(egress, LINE_DIR)
        line = _line(box)
        listener = listen(line.directory, _SOCKET, line.owner)
        self._exits[box.info.id] = _Exit(box, dataclasses.asdict(egress), listener)
        await self.ready_for(box.info.id)

    async def detach(self, sandbox_id: str) -> None:
        """Ends what a sandbox has outside; one that has nothing is no error."""
        way_out = self._exits.pop(sandbox_id, None)
        if way_out is not None:
            way_out.listener.close()
            with contextlib.suppress(SandboxEgressDown):
                await self._order({"do": "close", "sandbox": sandbox_id})

    async def close(self) -> None:
        """Ends the engine."""
        self._shut = True
        if self._reviving is not None:
            self._reviving.cancel()
            await asyncio.wait([self._reviving])
        if self._engine is not None:
            engine, listening = self._engine, self._listening
            assert self._orders is not None and listening is not None
            self._orders.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ORDER_S):
                    await engine.wait()
            if engine.returncode is None:
                engine.kill()
            await listening

    async def _start(self, directory: Path) -> None:
        problem = self._problem()
        if problem is None and self._shut:
            problem = "the service is shutting down"
        if problem is not None:
            raise SandboxEgressDown(f"egress: {problem}.")
        directory.mkdir(mode=0o711, exist_ok=True)
        said = directory / "engine.log"
        python = self._settings.python or install.python()
        orders, theirs = socket.socketpair()
        orders.setblocking(False)
        try:
            with theirs, open(said, "wb") as file:
                engine = await asyncio.create_subprocess_exec(
                    str(python),
                    "-I",
                    str(engine_path()),
                    json.dumps(self._settings.for_engine(directory)),
                    stdin=theirs.fileno(),
                    stdout=PIPE,
                    stderr=file,
                    limit=_MAX_LINE,
                    env={"PATH": os.defpath, "HOME": str(directory)},
                    start_new_session=True,
                )
        except OSError as error:
            orders.close()
            raise SandboxEgressDown(f"egress: {python} cannot be run: {error.strerror}.") from None
        assert engine.stdout is not None
        try:
            async with asyncio.timeout(_START_S):
                hello = json.loads(await engine.stdout.readline() or b"{}")
        except TimeoutError:
            hello = {}
        except BaseException:
            orders.close()
            engine.kill()
            raise
        if "ready" not in hello:
            orders.close()
            with contextlib.suppress(ProcessLookupError):
                engine.kill()
            await engine.wait()
            last = said.read_text(errors="replace").strip().splitlines()[-1:]
            raise SandboxEgressDown(f"egress: the engine does not start. {' '.join(last)}".strip())
        self._engine, self._orders, self._certificate = engine, orders, hello["certificate"]
        log.info("egress engine runs (%s)", hello["ready"])
        self._listening = asyncio.get_running_loop().create_task(self._listen(engine, orders))
        for way_out in list(self._exits.values()):
            try:
                await self._open(way_out)
            except SandboxEgressDown as error:
                log.warning("sandbox %s: %s", way_out.box.info.id, error)

    async def _open(self, way_out: _Exit) -> None:
        certificate = _line(way_out.box).directory / CERTIFICATE
        try:
            certificate.write_text(self._certificate)
            certificate.chmod(0o644)
        except OSError as error:
            raise SandboxEgressDown(f"egress: {certificate}: {error.strerror}.") from None
        order = {"do": "open", "sandbox": way_out.box.info.id, "policy": way_out.policy}
        await self._order(order, way_out.listener)
        way_out.is_open = True

    async def _order(self, order: dict[str, Any], listener: socket.socket | None = None) -> None:
        orders = self._orders
        if orders is None:
            raise SandboxEgressDown("egress: the engine has just ended; it starts again.")
        self._numbers += 1
        number = self._numbers
        future = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        try:
            line = json.dumps({**order, "number": number}).encode() + b"\n"
            async with asyncio.timeout(_ORDER_S):
                async with self._sending:
                    await _send(orders, line, listener)
                answer = await future
        except (OSError, TimeoutError):
            raise SandboxEgressDown("egress: the engine does not answer.") from None
        finally:
            del self._answers[number]
        if "error" in answer:
            raise SandboxEgressDown(f"egress: the engine fails: {answer['error']}.")

    async def _listen(self, engine: Process, orders: socket.socket) -> None:
        """Hears an engine to its end."""
        assert engine.stdout is not None
        while line := await engine.stdout.readline():
            try:
                news = json.loads(line)
            except ValueError:
                log.error("the egress engine says %r", line[:200])
                engine.kill()
                break
            for verdict, reason, number in news.get("counts", ()):
                self._on_verdicts(verdict, reason, number)
            for event in news.get("events", ()):
                self._on_event(event.pop("sandbox"), event)
            future = self._answers.get(news.get("done", 0))
            if future is not None and not future.done():
                future.set_result(news)
        self._engine = self._orders = None
        for way_out in self._exits.values():
            way_out.is_open = False
        orders.close()
        status = await engine.wait()
        for future in self._answers.values():
            if not future.done():
                future.set_exception(ConnectionResetError())
        if not self._shut:
            log.warning("the egress engine has ended (status %d); it starts again", status)
            self._reviving = asyncio.get_running_loop().create_task(self._revive())

    async def _revive(self) -> None:
        pause_s = _AGAIN_S
        while self._exits:
            await asyncio.sleep(pause_s)
            try:
                await self.ready()
                return
            except SandboxEgressDown as error:
                log.warning("%s", error)
                pause_s = _LATER_S


async def _send(sock: socket.socket, line: bytes, passed: socket.socket | None) -> None:
    """Sends a line, with a socket."""
    loop, sent = asyncio.get_running_loop(), 0
    while passed is not None and sent == 0:
        try:
            sent = socket.send_fds(sock, [line], [passed.fileno()])
        except BlockingIOError:
            await asyncio.sleep(0.01)
    await loop.sock_sendall(sock, line[sent:])


def _line(box: Box) -> DialledLink:
    """The line of a sandbox of this host; backends of other hosts refuse egress."""
    assert isinstance(box.link, DialledLink)
    return box.link
