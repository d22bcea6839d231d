"""Requests to the API server by the official client, at the rate that the server allows.

The client knows kubeconfig files, tokens and TLS; objects stay plain dicts, for a server of another
version than the client's may leave out what its classes demand.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import yaml
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config
from kubernetes.aio.stream import WsApiClient

from sandbox.errors import SandboxError, SandboxGone, SandboxRefused, SandboxUnavailable

log = logging.getLogger("sandbox")

Json = dict[str, Any]

# Seconds that one request may take, and that a refusal for want of room is waited out.
_REQUEST_S, _PATIENCE_S = 30.0, 60.0

# Between tries when the server does not say; doubles.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.25, 8.0

# Between two signs of life of a stream.
_HEARTBEAT_S = 20.0

_BUSY = (429, 500, 502, 503, 504)


class Conflict(SandboxError):
    """There is an object of that name, or it has changed meanwhile."""


class Expired(SandboxError):
    """The server has forgotten the version that a watch was to begin at."""


class Api:
    """A cluster's API server."""

    def __init__(self, configuration: Configuration, *, at_once: int) -> None:
        """Opens connections when they are needed.

        Args:
            configuration: Of the official client.
            at_once: Requests under way together; more wait here, not at the server.
        """
        # Watches and streams stay open, so connections are bounded here and not by the client.
        configuration.connection_pool_maxsize = 0
        self._client, self._streams = (
            ApiClient(configuration),
            WsApiClient(configuration, heartbeat=_HEARTBEAT_S),
        )
        self._room = asyncio.Semaphore(at_once)
        # Until then nobody asks: the server has said so to one of us.
        self._not_before = 0.0
        self.server = configuration.host
        self.throttled = 0

    @classmethod
    async def connect(cls, kubeconfig: str | None, *, at_once: int) -> Api:
        """Reads how to reach a cluster.

        Raises:
            SandboxUnavailable: nothing says how.
        """
        configuration = Configuration()
        try:
            if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
                load_incluster_config(configuration)
            else:
                await load_kube_config(kubeconfig, client_configuration=configuration)
        except (ConfigException, OSError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
            raise SandboxUnavailable(
                f"kubeconfig: {error}; name a file that reaches the cluster."
            ) from None
        return cls(configuration, at_once=at_once)

    async def close(self) -> None:
        """Closes every connection."""
        await self._client.close()
        await self._streams.close()

    async def request(
        self, method: str, path: str, body: Json | None = None, **query: str | int
    ) -> Json:
        """Asks once the server has room, and again while it says that it has none.

        A request may arrive twice, so whoever creates must know an earlier try of its own.

        Raises:
            SandboxError: of the kind that the refusal is.
        """
        give_up = time.monotonic() + _PATIENCE_S
        pause_s = _FIRST_PAUSE_S
        while True:
            async with self._room:
                await asyncio.sleep(self._not_before - time.monotonic())
                try:
                    status, headers, text = await self._once(method, path, body, query)
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    said = str(error) or type(error).__name__
                    status, headers, text = 0, {}, said
            if status and status not in _BUSY:
                break
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
            told = headers.get("Retry-After", "")
            wait_s = float(told) if told.isdecimal() else pause_s * random.uniform(0.5, 1.0)
            if status == 429:
                self.throttled += 1
                self._not_before = max(self._not_before, time.monotonic() + wait_s)
            if time.monotonic() + wait_s > give_up:
                if status:
                    break
                raise SandboxUnavailable(
                    f"the API server {self.server} does not answer: {text}; "
                    "see whether it runs, and whether kubeconfig names it."
                )
            log.info("%s %s: %s, again in %.1f s", method, path, status or text, wait_s)
            await asyncio.sleep(wait_s)
        if status >= 400:
            raise refusal(status, text)
        answer: Json = json.loads(text)
        return answer

    async def _once(
        self, method: str, path: str, body: Json | None, query: dict[str, str | int]
    ) -> tuple[int, Any, str]:
        async with asyncio.timeout(_REQUEST_S):
            response = (await self._send(method, path, body, query, _REQUEST_S)).response
            return response.status, response.headers, (await response.read()).decode()

    async def _send(
        self,
        method: str,
        path: str,
        body: Json | None,
        query: dict[str, str | int],
        timeout_s: float,
    ) -> Any:
        headers = {"Accept": "application/json"}
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        asked = await self._client.param_serialize(
            method,
            path,
            query_params=[(name, str(value)) for name, value in query.items()],
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        return await self._client.call_api(*asked, _request_timeout=timeout_s)

    async def watch(self, path: str, *, seconds: int, **query: str | int) -> AsyncIterator[Json]:
        """The events of a watch, until the server ends it.

        Raises:
            Expired: it cannot begin where it was to.
            SandboxError: it was refused, or broke.
        """
        told = {**query, "watch": 1, "allowWatchBookmarks": 1, "timeoutSeconds": seconds}
        try:
            # The server ends it in time; a connection that died without a word is noticed later.
            response = (await self._send("GET", path, None, told, seconds + _REQUEST_S)).response
            try:
                if response.status >= 400:
                    raise refusal(response.status, await response.text())
                while line := await response.content.readline():
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise refusal(event["object"].get("code", 500), json.dumps(event["object"]))
                    yield event
            finally:
                response.close()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise SandboxUnavailable(f"the API server ends a watch: {error}.") from None

    @asynccontextmanager
    async def stream(
        self, path: str, command: list[str]
    ) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """Runs a command in a container, its streams as messages of a channel byte and data.

        Raises:
            SandboxError: the server refuses, or does not answer.
        """
        flags = [("stdin", "1"), ("stdout", "1"), ("stderr", "1"), ("tty", "0")]
        asked = await self._streams.param_serialize(
            "GET",
            path,
            query_params=[*(("command", word) for word in command), *flags],
            header_params={},
            auth_settings=["BearerToken"],
        )
        try:
            async with self._room, asyncio.timeout(_REQUEST_S):
                answer = await self._streams.call_api(*asked, _preload_content=False)
                socket = await answer.response
        except aiohttp.WSServerHandshakeError as error:
            raise refusal(error.status, error.message) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise SandboxUnavailable(f"the API server gives no stream: {error}.") from None
        try:
            yield socket
        finally:
            await socket.close()


def refusal(status: int, text: str) -> SandboxError:
    """The error that an answer of the API server stands for."""
    try:
        answer = json.loads(text)
        said = str(answer.get("message", text))
    except ValueError:
        said = text.strip()
    said = said.rstrip(".")
    if status == 404:
        return SandboxGone(f"Kubernetes answers: {said}.")
    if status == 409:
        return Conflict(f"Kubernetes answers: {said}.")
    if status == 410:
        return Expired(f"Kubernetes answers: {said}.")
    if status == 403 and "exceeded quota" in said:
        return SandboxUnavailable(
            f"the quota of the namespace is used up: {said}; close sandboxes, ask for less in "
            "limits, or have the ResourceQuota raised."
        )
    if status == 403 and "forbidden: User" not in said and "cannot" not in said:
        # An admission rule: a LimitRange, a pod security level, a RuntimeClass that is not there.
        return SandboxRefused(f"Kubernetes does not admit the pod: {said}.")
    if status in (401, 403):
        return SandboxUnavailable(
            f"the service may not do this in the cluster: {said}; give its account the role of "
            "launch/kubernetes/account.yaml."
        )
    if status in (400, 422):
        return SandboxRefused(f"Kubernetes refuses the pod: {said}.")
    return SandboxUnavailable(f"Kubernetes answers {status}: {said}; try again later.")
