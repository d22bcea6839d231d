"""What the cluster says of this state directory's pods: one watch for all, nothing is polled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from sandbox.backends.kubernetes.api import Api, Expired, Json
from sandbox.errors import SandboxError, SandboxLost, SandboxRefused

log = logging.getLogger("sandbox")

# Seconds of one watch; the next begins where it ended.
_WATCH_S = 240
_PAUSE_S = 1.0

# Reasons for which a container that waits will not start.
_NO_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_NO_START = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")

# Hears of a pod each time it has changed; None once it is no more.
Listener = Callable[[Json | None], None]


class Pods:
    """The pods that a label selects, as last heard."""

    def __init__(self, api: Api, path: str, selector: str) -> None:
        """Describes them; `start` begins to watch.

        Args:
            api: Of the cluster.
            path: Of the namespace's pods at the API server.
            selector: What labels they have.
        """
        self._api, self._path, self._selector = api, path, selector
        self.known: dict[str, Json] = {}
        self._listeners: dict[str, list[Listener]] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Lists the pods, and watches them from then on."""
        version = await self._list()
        self._task = asyncio.get_running_loop().create_task(self._follow(version))

    async def close(self) -> None:
        """Stops watching."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def listen(self, name: str, listener: Listener) -> Callable[[], None]:
        """Tells `listener` of a pod, at once if it is known; returns what ends that."""
        self._listeners.setdefault(name, []).append(listener)
        if name in self.known:
            listener(self.known[name])

        def end() -> None:
            listeners = self._listeners.get(name, [])
            with suppress(ValueError):
                listeners.remove(listener)
            if not listeners:
                self._listeners.pop(name, None)

        return end

    async def until(self, name: str, holds: Callable[[Json | None], bool]) -> None:
        """Waits until a pod, or its absence, is as asked.

        Raises:
            Exception: what `holds` raises.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def listener(pod: Json | None) -> None:
            if done.done():
                return
            try:
                if holds(pod):
                    done.set_result(None)
            except SandboxError as error:
                done.set_exception(error)

        end = self.listen(name, listener)
        try:
            await done
        finally:
            end()

    async def _list(self) -> str:
        answer = await self._api.request("GET", self._path, labelSelector=self._selector)
        found = {pod["metadata"]["name"]: pod for pod in answer["items"]}
        for name in self.known.keys() - found.keys():
            self._tell(name, None)
        for name, pod in found.items():
            self._tell(name, pod)
        return str(answer["metadata"]["resourceVersion"])

    async def _follow(self, version: str) -> None:
        while True:
            try:
                events = self._api.watch(
                    self._path,
                    seconds=_WATCH_S,
                    labelSelector=self._selector,
                    resourceVersion=version,
                )
                async for event in events:
                    pod = event["object"]
                    version = pod["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        gone = event["type"] == "DELETED"
                        self._tell(pod["metadata"]["name"], None if gone else pod)
            except SandboxError as error:
                if not isinstance(error, Expired):
                    log.warning("the watch of the pods is begun again: %s", error)
                    await asyncio.sleep(_PAUSE_S)
                version = await self._list_again()

    async def _list_again(self) -> str:
        while True:
            try:
                return await self._list()
            except SandboxError as error:
                log.warning("the pods cannot be listed: %s", error)
                await asyncio.sleep(_PAUSE_S)

    def _tell(self, name: str, pod: Json | None) -> None:
        if pod is None:
            self.known.pop(name, None)
        else:
            self.known[name] = pod
        for listener in list(self._listeners.get(name, ())):
            listener(pod)


def runs(pod: Json | None) -> bool:
    """Whether a pod runs.

    Raises:
        SandboxError: it never will, or no more; the message says why.
    """
    if pod is None:
        raise SandboxLost("the pod of the sandbox was deleted by another than its service.")
    status = pod.get("status", {})
    phase = status.get("phase")
    containers: list[Json] = status.get("containerStatuses") or [{}]
    state: Json = containers[0].get("state", {})
    waiting = state.get("waiting") or {}
    said = str(waiting.get("message") or waiting.get("reason") or "").rstrip(".")
    if waiting.get("reason") in _NO_IMAGE:
        raise SandboxRefused(f"image: the cluster cannot pull it: {said}.")
    if waiting.get("reason") in _NO_START:
        raise SandboxError(f"the node cannot start the pod of the sandbox: {said}.")
    if phase in ("Failed", "Succeeded"):
        raise SandboxLost(f"the pod of the sandbox has ended: {_end(status, state)}.")
    return phase == "Running" and "running" in state


def _end(status: Json, state: Json) -> str:
    """Why a pod has ended, in a few words."""
    ended = state.get("terminated") or {}
    words = [
        str(status.get("reason") or ended.get("reason") or "by itself"),
        str(status.get("message") or ended.get("message") or "").strip(),
        f"exit status {ended['exitCode']}" if "exitCode" in ended else "",
    ]
    return ", ".join(word.rstrip(".") for word in words if word)


def why_pending(pod: Json | None) -> str:
    """What the cluster says of a pod that does not start, as a sentence or nothing."""
    for condition in (pod or {}).get("status", {}).get("conditions") or ():
        if condition.get("status") == "False" and condition.get("message"):
            return f" The cluster says: {condition['message'].rstrip('.')}."
    return ""
