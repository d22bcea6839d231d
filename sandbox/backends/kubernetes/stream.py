"""A line over `pods/exec`: one stream a pod, opened again whenever it breaks."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

import aiohttp

from sandbox.backends.kubernetes.api import Api
from sandbox.backends.kubernetes.pod import BRIDGE
from sandbox.errors import SandboxError, SandboxGone, SandboxLost
from sandbox.link import Link

log = logging.getLogger("sandbox")

# Seconds without a stream after which the pod is held to be lost: an API server may restart.
_REDIAL_S = 120.0

# Between two tries; doubles.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 5.0

_CHUNK = 1 << 16
_MAX_SAID = 500
_STDIN, _STDOUT, _STDERR, _STATUS = 0, 1, 2, 3


class StreamLink(Link):
    """The line to the agent of a pod that runs."""

    def __init__(self, api: Api, path: str, *, max_payload: int) -> None:
        """Begins to open the stream.

        Args:
            api: Of the cluster.
            path: Of the pod's `exec` at the API server.
            max_payload: Bytes that an answer of this sandbox may hold.
        """
        super().__init__(max_payload=max_payload, redial_s=_REDIAL_S)
        self._api, self._path = api, path
        # Once it is to end: what waits for a command hears that, however the pod then goes.
        self._ending: SandboxError | None = None
        # What the bridge, or the runtime in its place, said last.
        self.said = ""
        self._task = asyncio.get_running_loop().create_task(self._keep())

    def fail(self, error: SandboxError) -> None:
        """Ends the line, and the stream."""
        super().fail(self._ending or error)
        self._task.cancel()

    async def end_and_wait(self, why: SandboxError, patience_s: float) -> None:
        """Asks the agent to end the sandbox; returns when the stream has gone with it."""
        self._ending = why
        self.end()
        await asyncio.wait([self._task], timeout=patience_s)

    async def _keep(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while self._ending is None:
            try:
                async with self._api.stream(self._path, BRIDGE) as socket:
                    if await self._carry(socket):
                        pause_s = _FIRST_PAUSE_S
            except SandboxGone as error:
                self.fail(SandboxLost(str(error)))
            except SandboxError as error:
                self.said = str(error)
            if self._ending is None:
                log.debug("%s: the stream is opened again: %s", self._path, self.said)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    async def _carry(self, socket: aiohttp.ClientWebSocketResponse) -> bool:
        """Serves a stream until it breaks; returns whether the agent was heard on it."""
        wire = _Wire(socket)
        self.attach(wire)
        heard, said = False, ""
        try:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.BINARY or not message.data:
                    continue
                channel, data = message.data[0], message.data[1:]
                if channel == _STDOUT and data:
                    heard = True
                    self.feed(wire, data)
                elif channel == _STDERR:
                    said = (said + data.decode(errors="replace"))[-_MAX_SAID:]
                elif channel == _STATUS:
                    # How the bridge ended; what it said before tells more.
                    self.said = (said or data.decode(errors="replace")[-_MAX_SAID:]).strip()
                    break
        finally:
            wire.abort()
            self.lost(wire)
        return heard


class _Wire:
    """One stream; what is written goes out in order, by a task of its own."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._send())

    def write(self, frame: bytes) -> None:
        self._frames.put_nowait(frame)

    def abort(self) -> None:
        self._task.cancel()

    async def _send(self) -> None:
        # Whoever reads notices that the stream is broken.
        with suppress(aiohttp.ClientError, ConnectionError):
            while True:
                frame = await self._frames.get()
                for place in range(0, len(frame), _CHUNK):
                    chunk = frame[place : place + _CHUNK]
                    await self._socket.send_bytes(bytes([_STDIN]) + chunk)
