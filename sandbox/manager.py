"""The sandboxes of one service: which exist, when they end, what runs in them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

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
)
from sandbox.backends.base import Backend
from sandbox.backends.box import Box
from sandbox.checkpoints import Checkpoints
from sandbox.egress.proxy import EgressProxy
from sandbox.egress.settings import EgressSettings
from sandbox.errors import (
    SandboxEgressDown,
    SandboxError,
    SandboxGone,
    SandboxPaused,
    SandboxRefused,
    SandboxUnavailable,
    SandboxUnfinished,
)
from sandbox.files import Files
from sandbox.gates import Gate
from sandbox.link import OnOutput
from sandbox.look import Look
from sandbox.metrics import Metrics
from sandbox.pool import Pool
from sandbox.spec import Gates, SandboxSpec, check_id
from sandbox.usage import Usage, usage

log = logging.getLogger("sandbox")

# Linux takes at most 131072 bytes in one argument of a program.
_MAX_COMMAND = 120_000

# Ids kept of sandboxes that were closed before they were there.
_MAX_FORBIDDEN = 10_000


R = TypeVar("R")
C = TypeVar("C", bound=ExecResult)


@dataclass
class _Entry:
    info: SandboxInfo
    box: Box
    gate: Gate
    expiry: asyncio.TimerHandle
    # Requests under way, and the end of the time that it may go without one.
    busy: int = 0
    idle: asyncio.TimerHandle | None = None
    # What ran when it was paused; its agent cannot tell meanwhile.
    look: Look | None = None
    # Pausing, resuming and snapshots come one after another.
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def stop(self) -> None:
        """Cancels both timers."""
        self.expiry.cancel()
        if self.idle is not None:
            self.idle.cancel()


class Manager:
    """Creates, finds and removes sandboxes on one event loop."""

    def __init__(
        self,
        backend: Backend,
        *,
        pool: int = 0,
        pool_idle_s: float = 600.0,
        disk_mb: int = 0,
        egress: EgressSettings | None = None,
    ) -> None:
        """Keeps the sandboxes of a backend; `start` starts it.

        Args:
            backend: Not started yet.
            pool: Sandboxes that are kept ready, of the kinds asked for last.
            pool_idle_s: Seconds that one is kept ready.
            egress: How sandboxes are let out that ask for it.
            disk_mb: `limits.disk_mb` of sandboxes that ask for none; 0 leaves them without.
        """
        self._disk_mb = disk_mb
        self.backend = backend
        self.pool = Pool(backend, size=pool, idle_s=pool_idle_s, on_idle=self._reaped)
        self.metrics = Metrics(
            living=lambda: len(self._entries), waiting=lambda: len(self.pool.waiting)
        )
        self.egress = EgressProxy(
            egress or EgressSettings(),
            lambda: backend.store.directory / "egress",
            on_verdicts=lambda verdict, reason, number: self.metrics.verdicts.labels(
                verdict, reason
            ).inc(number),
            on_event=lambda sandbox_id, facts: self._record(sandbox_id, "egress", **facts),
        )
        self.checkpoints = Checkpoints(backend, self.metrics, record=self._record)
        self._entries: dict[str, _Entry] = {}
        self._closing: dict[str, asyncio.Task[None]] = {}
        self._creating: set[str] = set()
        # Closed before they were there: a caller that gave up may be heard before its request.
        self._forbidden: dict[str, None] = {}
        self._shut = False

    async def start(self) -> None:
        """Starts the backend; the sandboxes that it adopts are kept from now on."""
        adopted = await self.backend.start()
        self.metrics.reaps.labels("orphaned").inc(self.backend.reaped)
        self.metrics.adoptions.inc(len(adopted))
        for box in adopted:
            self._keep(box, self.backend.store.left_s(box.info))
            self._record(box.info.id, "adopt")
            if box.info.spec.egress is not None:
                try:
                    await self._let_out(box)
                except SandboxEgressDown as error:
                    log.warning("sandbox %s: %s", box.info.id, error)
        await self.checkpoints.start()

    async def stop(self) -> None:
        """Removes every sandbox, and what the service keeps beside them."""
        await self.close_all()
        await self.egress.close()
        await self.backend.close()

    async def create(self, sandbox_id: str, spec: SandboxSpec) -> SandboxInfo:
        """Makes a sandbox that expires after the spec's lifetime.

        The caller chooses the id, so that one who goes away before the answer can still close
        what was made, and one who asks twice gets one sandbox.
        """
        if self._shut:
            raise SandboxUnavailable("the sandbox service is shutting down.")
        check_id(sandbox_id)
        spec = self._with_quota(spec)
        if sandbox_id in self._forbidden:
            raise SandboxGone(f"sandbox {sandbox_id} was closed already.")
        if (entry := self._entries.get(sandbox_id)) and entry.info.spec == spec:
            return entry.info
        if sandbox_id in self._entries or sandbox_id in self._creating:
            raise SandboxRefused(f"there is a sandbox {sandbox_id} already; choose another id.")
        self._creating.add(sandbox_id)
        try:
            if (undoing := self._closing.get(sandbox_id)) is not None:
                # Its caller asks again, after the connection broke.
                await asyncio.wait([undoing])
            await self.checkpoints.check(spec)
            return await self._create(sandbox_id, spec)
        finally:
            self._creating.discard(sandbox_id)

    def _with_quota(self, spec: SandboxSpec) -> SandboxSpec:
        if spec.limits.disk_mb is not None or not self._disk_mb:
            return spec
        limits = dataclasses.replace(spec.limits, disk_mb=self._disk_mb)
        return dataclasses.replace(spec, limits=limits)

    async def _create(self, sandbox_id: str, spec: SandboxSpec) -> SandboxInfo:
        await self.egress.check(spec, self.backend.isolation)
        now, began = time.time(), time.monotonic()
        info = SandboxInfo(
            id=sandbox_id,
            backend=self.backend.name,
            isolation=self.backend.isolation,
            created_at=now,
            expires_at=now + spec.lifetime_s,
            spec=spec,
        )
        creation = asyncio.ensure_future(self._make(info))
        try:
            box = await asyncio.shield(creation)
        except asyncio.CancelledError:
            # A creation under way in a thread cannot be stopped: let it end, then undo it.
            self._start_undo(sandbox_id, creation)
            raise
        if sandbox_id in self._forbidden:
            self._start_undo(sandbox_id, creation)
            raise SandboxGone(f"sandbox {sandbox_id} was closed meanwhile.")
        self._keep(box, spec.lifetime_s - (time.monotonic() - began))
        return info

    async def _make(self, info: SandboxInfo) -> Box:
        """Claims or makes a sandbox; the intent is in the log before, the outcome after."""
        began = time.monotonic()
        limits = dataclasses.asdict(info.spec.limits)
        facts = {"image": info.spec.image, "snapshot": info.spec.snapshot, "limits": limits}
        self.backend.store.log(info.id, "create", **facts, labels=info.spec.labels)
        try:
            box = await self.pool.claim(info)
            source = "new" if box is None else "pool"
            if box is None:
                box = await self.backend.create(info)
            if info.spec.egress is not None:
                await self._let_out(box)
            await self.checkpoints.restore(box)
        except (SandboxError, OSError) as error:
            await self.egress.detach(info.id)
            self._record(info.id, "fail", error=str(error))
            raise
        self.pool.want(info.spec)
        seconds = time.monotonic() - began
        self._record(info.id, "ready", source=source, seconds=round(seconds, 6))
        self.metrics.creations.labels(source).observe(seconds)
        return box

    async def _let_out(self, box: Box) -> None:
        """Opens the way out of a sandbox; one that does not get it is removed."""
        try:
            await self.egress.attach(box)
        except BaseException:
            if box.info.id not in self._entries:
                await self.egress.detach(box.info.id)
                await asyncio.shield(box.close())
            raise

    def _record(self, sandbox_id: str, kind: str, **facts: Any) -> None:
        """Logs what has happened already; what may not be logged is not begun, but this is done."""
        try:
            self.backend.store.log(sandbox_id, kind, **facts)
        except SandboxUnavailable as error:
            log.warning("sandbox %s: %s %s is not logged: %s", sandbox_id, kind, facts, error)

    def _keep(self, box: Box, left_s: float) -> None:
        gate = Gate(self.backend.store, box.info.id)
        loop = asyncio.get_running_loop()
        expiry = loop.call_later(left_s, self._expire, box.info.id)
        entry = self._entries[box.info.id] = _Entry(box.info, box, gate, expiry)
        self._rest(entry)

    def list(self) -> list[SandboxInfo]:
        """Every sandbox, oldest first."""
        return [entry.info for entry in self._entries.values()]

    def info(self, sandbox_id: str) -> SandboxInfo:
        """One sandbox.

        Raises:
            SandboxGone: there is none of that id.
        """
        return self._entry(sandbox_id).info

    def events(self, sandbox_id: str, *, after: int, limit: int) -> Sequence[Event]:
        """What was done to a sandbox, and in it, also when it is no more.

        Raises:
            SandboxGone: nothing is known of it, or no more.
        """
        found = self.backend.store.events(sandbox_id, after=after, limit=limit)
        if not found and after == 0:
            raise SandboxGone(f"the log has no sandbox {sandbox_id}; old ones are dropped.")
        return found

    def usage(self) -> dict[str, dict[str, Any]]:
        """What each sandbox takes of the host now, by id."""
        agents = {i: entry.box.link.agent_pid or 0 for i, entry in self._entries.items()}
        # One that another service has paused has not dialled yet.
        dialled = [agent for agent in agents.values() if agent]
        used = usage(dialled, minded=self.backend.isolation != "none")
        return {
            sandbox_id: {
                "state": self._state(self._entries[sandbox_id]),
                **dataclasses.asdict(used.get(agent, Usage(0, 0))),
            }
            for sandbox_id, agent in agents.items()
        }

    def _state(self, entry: _Entry) -> str:
        if entry.box.link.is_lost:
            return "lost"
        if entry.info.paused_at is not None:
            return "paused"
        return "busy" if entry.busy else "idle"

    @contextlib.contextmanager
    def workspace(
        self, sandbox_id: str, kind: str, path: str = "", *, writes: bool = False
    ) -> Iterator[Files]:
        """The files of a sandbox, for a transfer that the log names."""
        entry = self._awake(sandbox_id)
        with entry.gate.writing() if writes else contextlib.nullcontext(), self._use(entry):
            self.backend.store.log(sandbox_id, kind, **({"path": path} if path else {}))
            yield entry.box.workspace

    async def exec(
        self, sandbox_id: str, request: ExecRequest, on_output: OnOutput | None = None
    ) -> ExecResult:
        """Runs one command; closing the sandbox ends it with `SandboxGone`."""
        entry = self._working(sandbox_id)
        _check_size(entry, request.command, {**entry.info.spec.env, **request.env})
        limit = entry.info.spec.limits.output_bytes
        if request.output_bytes is not None and request.output_bytes > limit:
            raise SandboxRefused(f"output_bytes: may not be over the sandbox's limit of {limit}.")
        facts = {"command": request.command, "cwd": request.cwd}
        return await self._command(
            entry, "exec", facts, partial(entry.box.exec, request, on_output)
        )

    async def _command(
        self, entry: _Entry, kind: str, facts: dict[str, Any], work: Callable[[], Awaitable[C]]
    ) -> C:
        """Waits for a command; the log has it before it runs, and how it ended."""
        sandbox_id, note = entry.info.id, self._record
        self.backend.store.log(sandbox_id, kind, **facts)
        began = time.monotonic()
        try:
            if entry.info.spec.egress is not None:
                # Without its proxy a command fails by no fault of its own.
                await self.egress.ready_for(sandbox_id)
                if kind != "check":
                    # The work may have ended meanwhile.
                    entry.gate.admit_work()
            with self._use(entry):
                result = await work()
        except SandboxError as error:
            note(sandbox_id, "fail", error=str(error))
            raise
        except asyncio.CancelledError:
            note(sandbox_id, "cancel")
            raise
        seconds = time.monotonic() - began
        self.metrics.commands.labels(kind).observe(seconds)
        self.metrics.overheads.labels(kind).observe(max(0.0, seconds - result.duration_s))
        note(
            sandbox_id,
            "exit",
            exit_code=result.exit_code,
            timed_out=result.timed_out,
            seconds=round(result.duration_s, 6),
            stdout_bytes=result.stdout_bytes,
            stderr_bytes=result.stderr_bytes,
        )
        return result

    async def open_session(self, sandbox_id: str, name: str, request: SessionRequest) -> None:
        """Starts a session under a name of its own."""
        entry = self._working(sandbox_id)
        check_session(name)
        _check_size(entry, "", {**entry.info.spec.env, **request.env})
        self.backend.store.log(sandbox_id, "open", session=name, cwd=request.cwd)
        with self._use(entry):
            await entry.box.open_session(name, request)

    async def run(
        self, sandbox_id: str, name: str, request: RunRequest, on_output: OnOutput | None = None
    ) -> SessionResult:
        """Runs a command in a session."""
        entry = self._working(sandbox_id)
        check_session(name)
        _check_size(entry, request.command, {})
        facts = {"session": name, "command": request.command}
        return await self._command(
            entry, "run", facts, partial(entry.box.run, name, request, on_output)
        )

    async def close_session(self, sandbox_id: str, name: str) -> None:
        """Ends a session; one that is not there is no error."""
        entry = self._awake(sandbox_id)
        check_session(name)
        self.backend.store.log(sandbox_id, "end", session=name)
        with self._use(entry):
            await entry.box.close_session(name)

    async def cancel(self, sandbox_id: str, operation: str) -> None:
        """Ends an operation that its caller has given up."""
        await self._entry(sandbox_id).box.link.cancel(operation)

    async def pause(self, sandbox_id: str) -> SandboxInfo:
        """Stops everything in a sandbox until it is resumed; one that is paused stays so."""
        return await _whole(self._pause(self._entry(sandbox_id)))

    async def _pause(self, entry: _Entry) -> SandboxInfo:
        async with entry.turn:
            if entry.info.paused_at is None:
                look = await entry.box.look()
                # Before it stands still: another service must know that it was meant to.
                self._note_paused(entry, time.time())
                try:
                    await entry.box.freeze()
                except BaseException:
                    self._note_paused(entry, None)
                    raise
                entry.look = look
                self._record(entry.info.id, "pause")
            return entry.info

    async def resume(self, sandbox_id: str) -> SandboxInfo:
        """Lets everything in a paused sandbox run on; one that runs does so."""
        return await _whole(self._resume(self._entry(sandbox_id)))

    async def _resume(self, entry: _Entry) -> SandboxInfo:
        async with entry.turn:
            if entry.info.paused_at is not None:
                paused_at, look = entry.info.paused_at, entry.look
                # Before it runs: another service must know that it is meant to.
                self._note_paused(entry, None)
                entry.look = None
                try:
                    await entry.box.thaw()
                except BaseException:
                    entry.look = look
                    self._note_paused(entry, paused_at)
                    raise
                self._record(entry.info.id, "resume")
            return entry.info

    def _note_paused(self, entry: _Entry, at: float | None) -> None:
        info = dataclasses.replace(entry.info, paused_at=at)
        self.backend.store.update(info)
        entry.info = entry.box.info = info
        self._rest(entry)

    async def snapshot(self, sandbox_id: str) -> SnapshotInfo:
        """Keeps the files and sessions of a sandbox, which stands still meanwhile."""
        entry = self._entry(sandbox_id)
        with self._use(entry):
            async with entry.turn:
                if entry.info.paused_at is not None and entry.look is None:
                    raise SandboxPaused(
                        f"sandbox {sandbox_id} was paused by a service that is gone, and with it "
                        "what it knew of the sessions: resume it before a snapshot."
                    )
                return await self.checkpoints.take(entry.box, entry.look)

    def arm(self, sandbox_id: str, gates: Gates) -> None:
        """Sets the gates of a sandbox, once and for all."""
        entry = self._entry(sandbox_id)
        _check_size(entry, gates.finish_check, entry.info.spec.env)
        facts = {"parts": len(gates.reading), "finish_check": gates.finish_check}
        self.backend.store.log(sandbox_id, "arm", **facts)
        with self._use(entry):
            entry.gate.arm(gates)

    def take(self, sandbox_id: str, part: int) -> str:
        """A text of a sandbox's mandatory reading."""
        entry = self._entry(sandbox_id)
        self.backend.store.log(sandbox_id, "take", part=part)
        with self._use(entry):
            return entry.gate.take(part)

    async def end(self, sandbox_id: str, request: EndRequest) -> ExecResult | None:
        """Ends the work in a sandbox, if its gates let it; what runs is killed.

        Returns:
            The result of the finish check; None if there is none, or the end was before.

        Raises:
            SandboxGated: there is something to read yet.
            SandboxUnfinished: the finish check fails.
        """
        entry = self._awake(sandbox_id)
        with entry.gate.ending() as finish_check:
            if finish_check is None:
                return None
            result = None
            if finish_check:
                check = ExecRequest(finish_check, **vars(request))
                facts = {"command": finish_check}
                result = await self._command(entry, "check", facts, partial(entry.box.exec, check))
                if result.exit_code != 0:
                    failed = dataclasses.asdict(result)
                    raise SandboxUnfinished("the finish check fails.", check=failed)
            with self._use(entry):
                await entry.box.halt()
            entry.gate.end()
            self._record(sandbox_id, "finish")
            return result

    async def close(self, sandbox_id: str) -> None:
        """Removes a sandbox; closing one that is not there, or not yet, forbids its id."""
        if sandbox_id not in self._entries:
            self._forbidden[sandbox_id] = None
            while len(self._forbidden) > _MAX_FORBIDDEN:
                del self._forbidden[next(iter(self._forbidden))]
        self._start_close(sandbox_id, "asked")
        if closing := self._closing.get(sandbox_id):
            await asyncio.shield(closing)

    async def close_all(self) -> None:
        """Removes every sandbox, whether or not removing another fails; none can follow."""
        self._shut = True
        await self.pool.close()
        for sandbox_id in list(self._entries):
            self._start_close(sandbox_id, "shutdown")
        await asyncio.gather(*self._closing.values(), return_exceptions=True)

    def _entry(self, sandbox_id: str) -> _Entry:
        try:
            return self._entries[sandbox_id]
        except KeyError:
            raise SandboxGone(f"there is no sandbox {sandbox_id}; it may have expired.") from None

    def _awake(self, sandbox_id: str) -> _Entry:
        entry = self._entry(sandbox_id)
        if entry.info.paused_at is not None:
            raise SandboxPaused(f"sandbox {sandbox_id} is paused: resume it first.")
        return entry

    def _working(self, sandbox_id: str) -> _Entry:
        """A sandbox whose gates let work through."""
        entry = self._awake(sandbox_id)
        entry.gate.admit_work()
        return entry

    @contextlib.contextmanager
    def _use(self, entry: _Entry) -> Iterator[None]:
        """Keeps a sandbox from being idle."""
        entry.busy += 1
        try:
            yield
        finally:
            entry.busy -= 1
            self._rest(entry)

    def _rest(self, entry: _Entry) -> None:
        """Begins the time that a sandbox may be idle; one that is closed already has none."""
        if entry.idle is not None:
            entry.idle.cancel()
        idle_s = entry.info.spec.idle_s
        # Whoever pauses one will come back: it is not idle.
        if (
            entry.info.paused_at is None
            and idle_s is not None
            and self._entries.get(entry.info.id) is entry
        ):
            loop = asyncio.get_running_loop()
            entry.idle = loop.call_later(idle_s, self._end_idle, entry)

    def _end_idle(self, entry: _Entry) -> None:
        if not entry.busy:
            self._reaped("abandoned")
            self._start_close(entry.info.id, "idle")

    def _expire(self, sandbox_id: str) -> None:
        self._reaped("expired")
        self._start_close(sandbox_id, "expired")

    def _reaped(self, reason: str) -> None:
        self.metrics.reaps.labels(reason).inc()

    def _start_close(self, sandbox_id: str, why: str) -> None:
        entry = self._entries.pop(sandbox_id, None)
        if entry is not None:
            self._record(sandbox_id, "close", why=why)
            entry.stop()
            task = asyncio.get_running_loop().create_task(self._close(entry))
            self._closing[sandbox_id] = task

    def _start_undo(self, sandbox_id: str, creation: asyncio.Future[Box]) -> None:
        task = asyncio.get_running_loop().create_task(self._undo(sandbox_id, creation))
        self._closing[sandbox_id] = task

    async def _undo(self, sandbox_id: str, creation: asyncio.Future[Box]) -> None:
        try:
            box = await creation
            await self.egress.detach(sandbox_id)
            await box.close()
        except (SandboxError, OSError, RuntimeError):
            log.exception("sandbox %s, whose caller went away, was not undone", sandbox_id)
        finally:
            self._closing.pop(sandbox_id, None)

    async def _close(self, entry: _Entry) -> None:
        try:
            await self.egress.detach(entry.info.id)
            await entry.box.close()
        except (SandboxError, OSError, RuntimeError):
            log.exception("sandbox %s could not be removed wholly", entry.info.id)
            raise
        finally:
            self._closing.pop(entry.info.id, None)


async def _whole(work: Coroutine[Any, Any, R]) -> R:
    """Does something to its end, also if whoever waits for it goes away."""
    return await asyncio.shield(asyncio.ensure_future(work))


def _check_size(entry: _Entry, command: str, env: Mapping[str, str]) -> None:
    size = sum(len(text.encode()) for text in (command, *env, *env.values()))
    if size > _MAX_COMMAND:
        raise SandboxRefused(
            f"command: takes {size} bytes with its environment, over {_MAX_COMMAND}; "
            "write a file and run that."
        )
