"""The process that lets sandboxes out: `python -I engine.py SETTINGS`, with mitmproxy's Python.

It takes orders from its standard input, a Unix socket, and answers on its standard output, an
object of JSON a line, and ends with its input, so with the service. See `sandbox.egress.proxy`.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import fcntl
import json
import logging
import os
import resource
import shutil
import socket
import sys
import types
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The package of the service's Python, without what else that has: mitmproxy asks for other
    # versions.
    package = types.ModuleType("sandbox")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["sandbox"] = package

import certifi
from mitmproxy import master, options, version
from mitmproxy.addons import core, next_layer, proxyserver, tlsconfig

from sandbox.egress.audit import Audit
from sandbox.egress.connection import Box, Connection
from sandbox.egress.gate import Gate
from sandbox.egress.policy import Policy, Verdict

# What Python imports only when text is in it.
_ENCODINGS = ("ascii", "idna", "latin-1", "punycode", "utf-8")

# Connections that one sandbox may have at once.
_MAX_CONNECTIONS = 96
_BUSY = b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Engine:
    """The sockets of all sandboxes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Prepares mitmproxy.

        Args:
            settings: `directory`, `hosts`, `pypi`, `npm`, `user` (to become, or None), `trusted` (a
                file of certificates).
        """
        directory = Path(settings["directory"])
        if settings["trusted"] is None:
            settings["trusted"] = str(directory / "trusted.pem")
            shutil.copyfile(certifi.where(), directory / "trusted.pem")
        self._settings = settings
        self._options = options.Options()
        self._master = master.Master(self._options)
        certificates = tlsconfig.TlsConfig()
        self._master.addons.add(
            core.Core(),
            proxyserver.Proxyserver(),
            next_layer.NextLayer(),
            certificates,
        )
        with open(directory / "lock", "w") as lock:
            # The first of several engines makes the authority.
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._options.update(
                confdir=str(directory / "authority"),
                server=False,
                # Nothing is dialled before a request is judged.
                connection_strategy="lazy",
                upstream_cert=False,
                # What is not HTTP/1.1 is not let pass.
                http2=False,
                http3=False,
                rawtcp=False,
                websocket=False,
                validate_inbound_headers=True,
                ssl_verify_upstream_trusted_ca=settings["trusted"],
            )
        self._audit = Audit(directory / "audit", tell)
        hosts = {name: (address, port) for name, (address, port) in settings["hosts"].items()}
        self._gate = Gate(self._audit, hosts)
        self._servers: dict[str, tuple[asyncio.Server, Box]] = {}
        self.certificate: bytes = certificates.certstore.default_ca.to_pem()

    async def open(self, order: dict[str, Any], listener: socket.socket) -> None:
        """Lets a sandbox out by a socket, until it is closed."""
        await self.close(order)
        policy = Policy(order["policy"], pypi=self._settings["pypi"], npm=self._settings["npm"])
        box = Box(order["sandbox"], policy)
        server = await asyncio.start_unix_server(
            lambda reader, writer: self._serve(box, reader, writer), sock=listener
        )
        self._servers[box.name] = server, box

    async def close(self, order: dict[str, Any]) -> None:
        """Ends what a sandbox has; one that is not there has nothing."""
        server, box = self._servers.pop(order["sandbox"], (None, None))
        if server is not None and box is not None:
            server.close()
            for task in box.connections:
                task.cancel()
            self._audit.forget(box.name)

    async def _serve(
        self, box: Box, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        box.connections.add(task)
        try:
            if len(box.connections) > _MAX_CONNECTIONS:
                self._audit.verdict(box.name, Verdict(False, "busy"), "-", "")
                writer.write(_BUSY)
                return
            connection = Connection(
                box, self._gate, self._master.addons, self._options, reader, writer
            )
            with contextlib.suppress(asyncio.CancelledError):
                await connection.handle_client()
            if connection.incoming.has_read and not connection.is_judged:
                # What was said was no HTTP, or no TLS that both sides agreed on.
                self._audit.verdict(
                    box.name, Verdict(False, "protocol"), "-", connection.tunnel or ""
                )
        finally:
            box.connections.discard(task)
            writer.close()


def tell(news: dict[str, Any]) -> None:
    """Sends an object to the service."""
    print(json.dumps(news), flush=True)


class Orders:
    """Lines from the service, each with the descriptor that came with it, if one did."""

    def __init__(self, sock: socket.socket) -> None:
        """Reads a connected socket."""
        self._socket, self._data = sock, b""
        self._lines: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._fds: list[int] = []
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock.fileno(), self._read)

    async def next(self) -> dict[str, Any] | None:
        """The next order; None at the end."""
        line = await self._lines.get()
        return None if line is None else json.loads(line)

    def listener(self) -> socket.socket:
        """The socket that came with the order to open a sandbox."""
        return socket.socket(fileno=self._fds.pop(0))

    def _read(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 16)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        self._fds += fds
        *lines, self._data = (self._data + data).split(b"\n")
        for line in lines:
            self._lines.put_nowait(line)
        if not data:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._lines.put_nowait(None)


class Few(logging.Filter):
    """Lets the first records pass: a sandbox can cause any number, and they go to a file."""

    _left = 1_000

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether there is room for one more."""
        self._left -= 1
        return self._left >= 0


def _become(user: int) -> None:
    """Gives up root for a user that owns nothing: what is parsed here is hostile.

    It may not be able to read the environment's modules, so all must have been imported.
    """
    for name in _ENCODINGS:
        codecs.lookup(name)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


async def main(settings: dict[str, Any]) -> None:
    """Serves until the input ends."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    engine = Engine(settings)
    if settings["user"] is not None:
        os.chown(Path(settings["directory"], "audit"), settings["user"], settings["user"])
        _become(settings["user"])
    orders = Orders(socket.socket(fileno=sys.stdin.fileno()))
    version_of = f"mitmproxy {version.VERSION}"
    tell({"ready": version_of, "certificate": engine.certificate.decode()})
    while (order := await orders.next()) is not None:
        try:
            if order["do"] == "open":
                await engine.open(order, orders.listener())
            else:
                await engine.close(order)
            tell({"done": order["number"]})
        except (OSError, ValueError) as error:
            tell({"done": order["number"], "error": str(error)})


if __name__ == "__main__":
    handler = logging.StreamHandler()
    handler.addFilter(Few())
    form = "%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, handlers=[handler])
    asyncio.run(main(json.loads(sys.argv[1])))
