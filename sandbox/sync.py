"""The client for code without an event loop: scripts, notebooks, threads.

Each method is the asynchronous client's, run on the loop of one background thread. Any number of
threads may share a client. Interrupted by Ctrl-C, a call undoes what it began, as a cancelled one
does: its command is killed, its sandbox removed.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar

from sandbox.api import SandboxInfo
from sandbox.client import Sandbox, SandboxClient, Session
from sandbox.errors import SandboxRefused
from sandbox.spec import SandboxSpec

__all__ = ["SyncSandbox", "SyncSandboxClient", "SyncSession"]

_SLICE_S = 0.2

P = ParamSpec("P")
T = TypeVar("T")


class _Closable(Protocol):
    async def close(self) -> None: ...


A = TypeVar("A", bound=_Closable)


class _LoopThread:
    """A thread with an event loop that others give work to."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # Forgotten, it keeps no interpreter from ending.
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="sandbox-client", daemon=True
        )
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for the work; an exception that ends the wait cancels it and waits for that."""
        if not self._thread.is_alive() or threading.current_thread() is self._thread:
            work.close()
            raise SandboxRefused(
                "the sandbox client is closed, or called from its own on_output; "
                "open another, or collect the output and call later."
            )
        tasks: list[asyncio.Task[T]] = []
        done: Future[asyncio.Task[T]] = Future()

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(done.set_result)

        self._loop.call_soon_threadsafe(begin)
        try:
            _await(done)
        except BaseException:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            _await(done)
            raise
        return tasks[0].result()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()


def _await(done: Future[Any]) -> None:
    """Waits in slices: a Ctrl-C just before a wait begins would be heard only at its end."""
    while True:
        with suppress(TimeoutError):
            done.result(_SLICE_S)
            return


class _Blocking(Generic[A]):
    """An object of the asynchronous client; leaving its `with` closes it."""

    def __init__(self, inner: A, thread: _LoopThread) -> None:
        self._inner, self._thread = inner, thread

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes it, as the asynchronous one's `close` does."""
        self._thread.run(self._inner.close())


def _blocking(
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[_Blocking[A], P], T]:
    """A method of the asynchronous client as one that waits, with its signature and its words."""

    @functools.wraps(method)
    def call(self: _Blocking[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._thread.run(method(self._inner, *args, **kwargs))

    return call


class SyncSession(_Blocking[Session]):
    """One shell in a sandbox; see `sandbox.client.Session`."""

    run = _blocking(Session.run)

    @property
    def name(self) -> str:
        """Its name, for `SyncSandbox.attach_session`."""
        return self._inner.name


class SyncSandbox(_Blocking[Sandbox]):
    """One sandbox; see `sandbox.client.Sandbox`. `on_output` is called in another thread."""

    exec = _blocking(Sandbox.exec)
    write = _blocking(Sandbox.write)
    read = _blocking(Sandbox.read)
    upload_tree = _blocking(Sandbox.upload_tree)
    download_tree = _blocking(Sandbox.download_tree)
    arm = _blocking(Sandbox.arm)
    take_part = _blocking(Sandbox.take_part)
    end = _blocking(Sandbox.end)
    pause = _blocking(Sandbox.pause)
    resume = _blocking(Sandbox.resume)
    snapshot = _blocking(Sandbox.snapshot)

    @property
    def id(self) -> str:
        """The sandbox's id, for `SyncSandboxClient.attach`."""
        return self._inner.id

    @property
    def info(self) -> SandboxInfo:
        """The sandbox as the service sees it."""
        return self._inner.info

    def session(
        self, name: str | None = None, *, cwd: str = ".", env: Mapping[str, str] | None = None
    ) -> SyncSession:
        """Starts a shell; see `sandbox.client.Sandbox.session`."""
        session = self._thread.run(self._inner.session(name, cwd=cwd, env=env))
        return SyncSession(session, self._thread)

    def attach_session(self, name: str) -> SyncSession:
        """A session that was started earlier, perhaps by another process."""
        return SyncSession(self._inner.attach_session(name), self._thread)


class SyncSandboxClient(_Blocking[SandboxClient]):
    """A sandbox service; see `sandbox.client.SandboxClient`. Open it by `with`, or close it."""

    def __init__(
        self, base_url: str, token: str | None = None, *, reconnect_s: float = 0.0
    ) -> None:
        """Describes the service; the arguments are `sandbox.client.SandboxClient`'s."""
        super().__init__(SandboxClient(base_url, token, reconnect_s=reconnect_s), _LoopThread())

    health = _blocking(SandboxClient.health)
    list = _blocking(SandboxClient.list)
    usage = _blocking(SandboxClient.usage)
    log = _blocking(SandboxClient.log)
    snapshots = _blocking(SandboxClient.snapshots)
    delete_snapshot = _blocking(SandboxClient.delete_snapshot)

    def create(self, spec: SandboxSpec | None = None) -> SyncSandbox:
        """Makes a sandbox; without a spec, one with the default limits."""
        return SyncSandbox(self._thread.run(self._inner.create(spec)), self._thread)

    def attach(self, sandbox_id: str) -> SyncSandbox:
        """A sandbox that was created earlier, perhaps by another process."""
        return SyncSandbox(self._thread.run(self._inner.attach(sandbox_id)), self._thread)

    def close(self) -> None:
        """Closes the connections and ends the thread; sandboxes live on."""
        if self._thread.is_alive:
            super().close()
            self._thread.stop()
