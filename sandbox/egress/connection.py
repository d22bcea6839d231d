"""One connection out of a sandbox, as mitmproxy serves it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from mitmproxy import flow, options
from mitmproxy.addonmanager import AddonManager
from mitmproxy.proxy import commands, mode_specs, server
from mitmproxy.proxy.layers.modes import HttpProxy

from sandbox.egress.policy import Policy

log = logging.getLogger("sandbox")

# Bytes that may come before the head of a request is whole, those of a handshake and of the body
# of a refused request included: mitmproxy keeps them in memory.
_MAX_HEAD = 262_144

# Lookups of names that one sandbox may have under way.
_MAX_LOOKUPS = 8


class Box:
    """A sandbox that may go out."""

    def __init__(self, name: str, policy: Policy) -> None:
        """Takes its name and policy."""
        self.name, self.policy = name, policy
        self.lookups = asyncio.Semaphore(_MAX_LOOKUPS)
        self.connections: set[asyncio.Task[Any]] = set()


class Reader:
    """Bytes of one side, cut off where they would only fill memory."""

    def __init__(self, inner: Any) -> None:
        """Wraps a stream's reader."""
        self._inner, self._waiting, self._streams = inner, 0, False
        self.has_read = False

    def passed(self, *, streams: bool) -> None:
        """A head is whole, so the count begins anew.

        Args:
            streams: Whether what follows is passed on as it comes.
        """
        self._streams, self._waiting = streams, 0

    async def read(self, size: int) -> bytes:
        """Reads; nothing more once too much has come."""
        data: bytes = await self._inner.read(size)
        self.has_read |= bool(data)
        if not self._streams:
            self._waiting += len(data)
            if self._waiting > _MAX_HEAD:
                return b""
        return data


class _Writer:
    """A stream's writer whose ends have addresses, as mitmproxy expects of TCP."""

    def __init__(self, inner: asyncio.StreamWriter) -> None:
        self._inner = inner

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name in ("peername", "sockname"):
            return ("127.0.0.1", 0)
        return self._inner.get_extra_info(name, default)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Connection(server.LiveConnectionHandler):
    """A connection that a sandbox's relay has made; which sandbox, its socket says."""

    layer: Any

    def __init__(
        self,
        box: Box,
        gate: Any,
        addons: AddonManager,
        opts: options.Options,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Wraps an accepted connection.

        Args:
            box: Whose it is.
            gate: Its method of a hook's name, if there is one, decides.
            addons: What else mitmproxy needs.
            opts: Its options.
            reader: From the relay.
            writer: To the relay.
        """
        self.box, self._gate, self._addons = box, gate, addons
        self.incoming = Reader(reader)
        # Whether a verdict was asked for, beside that on a tunnel.
        self.is_judged = False
        # The tunnel's host and port, once there is one.
        self.tunnel: str | None = None
        # By upstream connection: what it is for while its address is a number, and its bytes.
        self.wanted: dict[str, tuple[str, int]] = {}
        self.outgoing: dict[str, Reader] = {}
        mode = mode_specs.ProxyMode.parse("regular")
        super().__init__(self.incoming, _Writer(writer), opts, mode)
        self.layer = HttpProxy(self.layer.context)

    async def handle_hook(self, hook: commands.StartHook) -> None:
        """Has the gate decide; where that fails, nothing passes."""
        with self.timeout_watchdog.disarm():
            (data,) = hook.args()
            decide = getattr(self._gate, hook.name, None)
            if decide is not None:
                try:
                    await decide(self, data)
                except Exception as error:
                    if not isinstance(error, ConnectionAbortedError):
                        log.exception("sandbox %s: %s fails", self.box.name, hook.name)
                    self._abort()
                    # The hook never ends, so what waits for it never goes on.
                    raise asyncio.CancelledError from error
            # Swallows the errors of addons, which is why the gate is none.
            await self._addons.handle_lifecycle(hook)
            if isinstance(data, flow.Flow):
                await data.wait_for_resume()

    def _abort(self) -> None:
        """Ends the connection and all that it has opened."""
        client = self.transports.get(self.client)
        if client is not None:
            client.writer.close()
            if client.handler is not None:
                client.handler.cancel()

    def guard(self, connection: Any) -> None:
        """Bounds what an upstream server may send before the head of an answer is whole."""
        transport = self.transports[connection]
        self.outgoing[connection.id] = transport.reader = Reader(transport.reader)

    def log(self, message: str, level: int = logging.INFO, exc_info: Any = None) -> None:
        """Says what is wrong with the engine itself; what a sandbox does is in the audit."""
        if level >= logging.ERROR:
            log.log(level, "sandbox %s: %s", self.box.name, message, exc_info=exc_info)
            # mitmproxy itself would leave it open, and its server's.
            self._abort()
