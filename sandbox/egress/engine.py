"""The process that lets sandboxes out: `python -I engine.py SETTINGS`, with mitmproxy's Python.

It takes orders from its standard input and answers on its standard output, an object of JSON a
line, and ends with its input, so with the service. See `sandbox.egress.proxy` for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
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

from mitmproxy import master, options, version
from mitmproxy.addons import core, disable_h2c, next_layer, proxyserver, tlsconfig

from sandbox.egress.audit import Audit
from sandbox.egress.connection import Box, Connection
from sandbox.egress.gate import Gate
from sandbox.egress.policy import Policy, Verdict
from sandbox.link import listen

SOCKET = "egress.sock"
# Connections that one sandbox may have at once.
_MAX_CONNECTIONS = 96
_BUSY = b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Engine:
    """The sockets of all sandboxes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Prepares mitmproxy.

        Args:
            settings: `directory`, `hosts`, `pypi`, `npm`, `trusted` (a file of certificates).
        """
        directory = Path(settings["directory"])
        self._settings = settings
        self._options = options.Options()
        self._master = master.Master(self._options)
        certificates = tlsconfig.TlsConfig()
        self._master.addons.add(
            core.Core(),
            proxyserver.Proxyserver(),
            next_layer.NextLayer(),
            disable_h2c.DisableH2C(),
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

    async def open(self, order: dict[str, Any]) -> None:
        """Lets a sandbox out by a socket in its directory, until it is closed."""
        await self.close(order)
        policy = Policy(order["policy"], pypi=self._settings["pypi"], npm=self._settings["npm"])
        box = Box(order["sandbox"], policy)
        listener = listen(Path(order["line"]), SOCKET, order["owner"])
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
        finally:
            box.connections.discard(task)
            writer.close()


def tell(news: dict[str, Any]) -> None:
    """Sends an object to the service."""
    print(json.dumps(news), flush=True)


async def main(settings: dict[str, Any]) -> None:
    """Serves until the input ends."""
    engine = Engine(settings)
    orders = asyncio.StreamReader(limit=1 << 24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    version_of = f"mitmproxy {version.VERSION}"
    tell({"ready": version_of, "certificate": engine.certificate.decode()})
    while line := await orders.readline():
        order = json.loads(line)
        try:
            await (engine.open if order["do"] == "open" else engine.close)(order)
            tell({"done": order["number"]})
        except (OSError, ValueError) as error:
            tell({"done": order["number"], "error": str(error)})


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    asyncio.run(main(json.loads(sys.argv[1])))
