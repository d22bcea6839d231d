"""The policy in mitmproxy: every tunnel, handshake, request and server's connection passes here."""

from __future__ import annotations

import asyncio

from mitmproxy import http, tls
from mitmproxy.proxy.server_hooks import ServerConnectionHookData

from sandbox.egress.audit import Audit
from sandbox.egress.connection import Connection
from sandbox.egress.lookup import Hosts, PrivateAddress, look_up
from sandbox.egress.policy import PORTS, STRIPPED, Request, Verdict

_LOOKUP_S = 10.0


class Gate:
    """Its methods are mitmproxy's hooks, by name."""

    def __init__(self, audit: Audit, hosts: Hosts) -> None:
        """Prepares it.

        Args:
            audit: Hears every verdict.
            hosts: Names that the service's operator resolves: an address and, if not the usual,
                a port. Unlike others they may lie in a private network.
        """
        self._audit, self._hosts = audit, hosts

    async def http_connect(self, connection: Connection, flow: http.HTTPFlow) -> None:
        """Judges a tunnel."""
        authority = f"{flow.request.host}:{flow.request.port}"
        if connection.tunnel is not None:
            verdict = Verdict(False, "protocol", "a tunnel within a tunnel is not let pass.")
        else:
            verdict = connection.box.policy.tunnel(authority)
        connection.incoming.passed(streams=False)
        if verdict.allowed:
            connection.tunnel = authority
        else:
            self._refuse(connection, flow, verdict, authority)

    async def tls_clienthello(self, connection: Connection, data: tls.ClientHelloData) -> None:
        """Ends a handshake that no tunnel announced."""
        data.ignore_connection = False
        if connection.tunnel is None:
            raise ConnectionAbortedError

    async def requestheaders(self, connection: Connection, flow: http.HTTPFlow) -> None:
        """Judges a request before anything of it goes out."""
        request, client = flow.request, flow.client_conn
        names = [*request.headers.get_all("host"), request.authority, connection.tunnel, client.sni]
        asked = Request(
            scheme=request.scheme,
            host=request.host,
            port=request.port,
            method=request.method,
            target=request.path,
            names=[name for name in names if name],
            headers=frozenset(name.lower() for name in request.headers),
        )
        verdict = connection.box.policy.judge(asked)
        if flow.error is not None:
            verdict = Verdict(False, "malformed", f"{flow.error.msg}.")
        connection.incoming.passed(streams=verdict.allowed)
        port = "" if request.port == PORTS.get(request.scheme) else f":{request.port}"
        url = f"{request.scheme}://{request.host}{port}{request.path}"
        if not verdict.allowed:
            self._refuse(connection, flow, verdict, url)
            return
        connection.is_judged = True
        self._audit.verdict(connection.box.name, verdict, request.method, url)
        for name in STRIPPED:
            request.headers.pop(name, None)
        request.stream = True

    async def request(self, connection: Connection, flow: http.HTTPFlow) -> None:
        """A request is whole: the next head begins."""
        connection.incoming.passed(streams=False)

    async def responseheaders(self, connection: Connection, flow: http.HTTPFlow) -> None:
        """Passes an answer on as it comes; one that changes the protocol ends the connection."""
        assert flow.response is not None
        guard = connection.outgoing.get(flow.server_conn.id)
        if flow.response.status_code == 101:
            flow.kill()
        elif guard is not None:
            flow.response.stream = True
            guard.passed(streams=True)

    async def response(self, connection: Connection, flow: http.HTTPFlow) -> None:
        """An answer is whole."""
        guard = connection.outgoing.get(flow.server_conn.id)
        if guard is not None:
            guard.passed(streams=False)

    async def server_connect(self, connection: Connection, data: ServerConnectionHookData) -> None:
        """Looks the name up once, and has that address dialled which was checked."""
        name, port = data.server.address
        verdict = None
        try:
            async with connection.box.lookups, asyncio.timeout(_LOOKUP_S):
                address = await look_up(name, port, self._hosts)
        except PrivateAddress:
            sentence = f"{name} leads to an address that is not on the internet."
            verdict = Verdict(False, "private_address", sentence)
        except (OSError, TimeoutError, UnicodeError):
            verdict = Verdict(False, "unresolved", f"{name} cannot be looked up.")
        if verdict is not None:
            self._audit.verdict(connection.box.name, verdict, "-", f"{name}:{port}")
            data.server.error = f"egress: {verdict.sentence}"
            return
        connection.wanted[data.server.id] = (name, port)
        data.server.sni = name
        data.server.address = address

    async def server_connected(
        self, connection: Connection, data: ServerConnectionHookData
    ) -> None:
        """Names a server's connection again, so that later requests find it."""
        # mitmproxy's own assignment refuses, for it takes the address for the one dialled.
        object.__setattr__(data.server, "address", connection.wanted.pop(data.server.id))
        connection.guard(data.server)

    def _refuse(
        self, connection: Connection, flow: http.HTTPFlow, verdict: Verdict, url: str
    ) -> None:
        connection.is_judged = True
        self._audit.verdict(connection.box.name, verdict, flow.request.method, url)
        flow.response = http.Response.make(
            403,
            f"egress refused: {verdict.sentence}\n",
            {"Content-Type": "text/plain", "X-Klong-Egress": verdict.reason},
        )
