"""Three ways to run the HTTP service: in a context, in the foreground, inside another process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aiohttp import web

from sandbox.backends import Backend, BackendName, disk, open_backend
from sandbox.egress.settings import EgressSettings
from sandbox.errors import SandboxRefused, SandboxUnavailable, host_fault
from sandbox.routes import create_app

if TYPE_CHECKING:
    from sandbox.backends.kubernetes.options import Options

# Of a sandbox that asks for no quota: more than work takes, less than fills a host's disk.
_DISK_MB = 10_000

# For files: their transfer and removal.
_THREADS = 8

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@contextlib.asynccontextmanager
async def running(
    backend: Backend,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    pool: int = 0,
    pool_idle_s: float = 600.0,
    egress: EgressSettings | None = None,
    disk_mb: int = 0,
) -> AsyncIterator[str]:
    """Serves while the context is open; yields the base URL.

    Raises:
        SandboxUnavailable: the port is taken, or the backend cannot work here.
        SandboxRefused: an address that others can reach, without a token.
    """
    if token is None and host not in _LOOPBACK:
        raise SandboxRefused(f"host {host} can be reached by others: set a token to serve there.")
    # A caller that goes away takes its command with it.
    runner = web.AppRunner(
        create_app(
            backend,
            token=token,
            pool=pool,
            pool_idle_s=pool_idle_s,
            disk_mb=disk_mb,
            egress=egress,
        ),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=5,
    )
    asyncio.get_running_loop().set_default_executor(_started_threads())
    try:
        await runner.setup()
    except OSError as error:
        raise host_fault(error) from error
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise SandboxUnavailable(
                    f"{host}, port {port}, cannot be served: {error.strerror}; choose others."
                ) from None
            raise SandboxUnavailable(
                f"port {port} of {host} is in use; choose another, or 0 for any free one."
            ) from None
        address = runner.addresses[0]
        name = f"[{host}]" if ":" in host else host
        yield f"http://{name}:{address[1]}"
    finally:
        await runner.cleanup()


def _started_threads() -> ThreadPoolExecutor:
    """Threads that are there already when the host has no more: to remove sandboxes, above all."""
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="sandbox-files")
    together = threading.Barrier(_THREADS + 1)
    for _ in range(_THREADS):
        threads.submit(together.wait)
    together.wait()
    return threads


def serve(
    *,
    backend: BackendName = "local",
    isolation: Literal["auto", "bubblewrap", "none"] = "auto",
    host: str = "127.0.0.1",
    port: int = 8700,
    token: str | None = None,
    state_dir: Path | None = None,
    pool: int = 0,
    pool_idle_s: float = 600.0,
    egress: EgressSettings | None = None,
    disk_mb: int | None = None,
    cluster: Options | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Serves until SIGINT or SIGTERM, then removes every sandbox.

    Its sandboxes survive the death of this process by anything else: the next service of the
    state directory adopts them, or they end with their lifetime.

    Args:
        backend: "local", "docker" or "kubernetes".
        isolation: Of the local backend; "auto" is "bubblewrap": whom one serves to must know of
            "none".
        host: Address to bind; other than loopback needs a token.
        port: Port to bind; 0 takes a free one.
        token: Bearer token to ask for.
        state_dir: Where workspaces live; None is a directory in the temporary one.
        pool: Sandboxes that are kept ready, of the kinds asked for last.
        pool_idle_s: Seconds that one is kept ready.
        egress: How sandboxes are let out that ask for it.
        disk_mb: `limits.disk_mb` of sandboxes that ask for none; 0 leaves them without. None:
            10 GB where this host can hold a quota, the namespace's default on Kubernetes.
        cluster: Of the Kubernetes backend; None takes its defaults.
        announce: Called once with a sentence that holds the URL.

    Raises:
        SandboxError: it cannot start; the message says why in one sentence.
    """
    quota_mb = _quota_mb(disk_mb, backend)

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        chosen = open_backend(
            backend,
            isolation="bubblewrap" if isolation == "auto" else isolation,
            state_dir=state_dir,
            durable=True,
            cluster=cluster,
        )
        async with running(
            chosen,
            host=host,
            port=port,
            token=token,
            pool=pool,
            pool_idle_s=pool_idle_s,
            egress=egress,
            disk_mb=quota_mb,
        ) as url:
            announce(f"sandbox service ({backend}, isolation {chosen.isolation}) at {url}")
            await stop.wait()

    asyncio.run(main())


def _quota_mb(asked: int | None, backend: BackendName) -> int:
    if backend == "kubernetes" and asked is None:
        return 0  # A LimitRange of the namespace says what is usual there.
    lack = None if backend == "kubernetes" else disk.problem()
    if asked is not None and asked != 0 and asked < 8:
        raise SandboxRefused(f"disk_mb: {asked} is too small; set 8 or more, or 0 for no quota.")
    if asked and lack is not None:
        raise SandboxRefused(f"disk_mb: {lack}; leave it out, or serve where it can be had.")
    if asked is None:
        return 0 if lack is not None else _DISK_MB
    return asked


@contextlib.contextmanager
def embedded(
    backend: BackendName | Backend = "local",
    *,
    isolation: Literal["auto", "bubblewrap", "none"] = "auto",
    token: str | None = None,
    state_dir: Path | None = None,
    pool: int = 0,
    egress: EgressSettings | None = None,
) -> Iterator[str]:
    """Serves from a background thread of this process on a free loopback port.

    Args:
        backend: "local", "docker", or a backend that is not started yet.
        isolation: Of the local backend.
        token: Bearer token to ask for.
        state_dir: Where workspaces live; None is a directory in the temporary one.
        pool: Sandboxes that are kept ready, of the kinds asked for last.
        egress: How sandboxes are let out that ask for it.

    Yields:
        The base URL. Leaving the context removes every sandbox.

    Raises:
        SandboxError: it cannot start; the message says why in one sentence.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="sandbox-service", daemon=True)
    thread.start()
    if isinstance(backend, str):
        backend = open_backend(backend, isolation=isolation, state_dir=state_dir)
    context = running(backend, token=token, pool=pool, egress=egress)
    try:
        url = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result()
        try:
            yield url
        finally:
            asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
