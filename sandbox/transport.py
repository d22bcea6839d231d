"""Requests to a sandbox service: one connection pool, every failure one of this package's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping

import aiohttp

from sandbox.errors import BY_KIND, SandboxError, SandboxUnavailable

# Hears "stdout" or "stderr" and a piece of text that a command has printed.
OnOutput = Callable[[str, str], None]


class Transport:
    """The way to one service."""

    def __init__(self, base_url: str, token: str | None) -> None:
        """Describes the service; nothing connects before the first request."""
        self.base_url = base_url.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Opens the connection pool, which every request does otherwise."""
        self._pool()

    async def close(self) -> None:
        """Closes the connection pool."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _pool(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No cap on connections: every running command holds one. No total deadline either:
            # an upload takes as long as it takes.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                headers=self._headers,
            )
        return self._session

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        query: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        """The body of an answer.

        Raises:
            SandboxError: of the kind that the service says, or that it does not answer.
        """
        async with self._answer(method, path, body, query, timeout_s) as response:
            return await response.read()

    async def stream(
        self, on_output: OnOutput, method: str, path: str, body: bytes, *, timeout_s: float
    ) -> bytes:
        """Passes on what a command prints while it runs; returns its result."""
        unread = b""
        async with self._answer(method, path, body, {"stream": "1"}, timeout_s) as response:
            async for chunk in response.content.iter_any():
                *lines, unread = (unread + chunk).split(b"\n")
                for line in map(json.loads, lines):
                    if "stream" in line:
                        on_output(line["stream"], line["text"])
                    elif "result" in line:
                        return json.dumps(line["result"]).encode()
                    else:
                        raise BY_KIND[line["kind"]](line["error"], **line["facts"])
        raise SandboxUnavailable("the answer of the sandbox service was cut.")

    @contextlib.asynccontextmanager
    async def _answer(
        self,
        method: str,
        path: str,
        body: bytes | None,
        query: Mapping[str, str] | None,
        timeout_s: float | None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer that is no error, with every failure as one of this package's."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=10)
        try:
            async with self._pool().request(
                method, self.base_url + path, data=body, params=query, timeout=timeout
            ) as response:
                if response.status >= 400:
                    raise _error(response.status, await response.read())
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise SandboxUnavailable(
                f"the sandbox service at {self.base_url} does not answer "
                f"({error or type(error).__name__})."
            ) from error


def _error(status: int, data: bytes) -> SandboxError:
    try:
        answer = json.loads(data)
        return BY_KIND[answer["kind"]](answer["error"], **answer.get("facts", {}))
    except (ValueError, KeyError, TypeError):
        if status == 500:
            return SandboxError("the sandbox service failed; its log says why.")
        # Not this service's answer: a proxy's, or another program's on that port.
        return SandboxUnavailable(f"the answer has status {status} and is not the service's.")
