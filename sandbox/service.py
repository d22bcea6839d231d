"""Three ways to run the HTTP service: in a context, in the foreground, inside another process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aiohttp import web

from sandbox.backends import Backend, BackendName, open_backend
from sandbox.errors import SandboxRefused, SandboxUnavailable
from sandbox.routes import create_app

if TYPE_CHECKING:
    from sandbox.backends.kubernetes.options import Options

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
        create_app(backend, token=token, pool=pool, pool_idle_s=pool_idle_s),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=5,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise SandboxUnavailable(
                f"port {port} of {host} is in use; choose another, or 0 for any free one."
            ) from None
        address = runner.addresses[0]
        name = f"[{host}]" if ":" in host else host
        yield f"http://{name}:{address[1]}"
    finally:
        await runner.cleanup()


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
        cluster: Of the Kubernetes backend; None takes its defaults.
        announce: Called once with a sentence that holds the URL.

    Raises:
        SandboxError: it cannot start; the message says why in one sentence.
    """

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
            chosen, host=host, port=port, token=token, pool=pool, pool_idle_s=pool_idle_s
        ) as url:
            announce(f"sandbox service ({backend}, isolation {chosen.isolation}) at {url}")
            await stop.wait()

    asyncio.run(main())


@contextlib.contextmanager
def embedded(
    backend: BackendName | Backend = "local",
    *,
    isolation: Literal["auto", "bubblewrap", "none"] = "auto",
    token: str | None = None,
    state_dir: Path | None = None,
    pool: int = 0,
) -> Iterator[str]:
    """Serves from a background thread of this process on a free loopback port.

    Args:
        backend: "local", "docker", or a backend that is not started yet.
        isolation: Of the local backend.
        token: Bearer token to ask for.
        state_dir: Where workspaces live; None is a directory in the temporary one.
        pool: Sandboxes that are kept ready, of the kinds asked for last.

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
    context = running(backend, token=token, pool=pool)
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
