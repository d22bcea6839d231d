"""The backend: pods made, adopted and removed."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sandbox import owner
from sandbox.agent.transfer import CHUNK
from sandbox.api import SandboxInfo
from sandbox.backends.base import clear
from sandbox.backends.box import Box
from sandbox.backends.inheritance import inherit
from sandbox.backends.kubernetes import pod as pods_of
from sandbox.backends.kubernetes.api import Api, Conflict, Json
from sandbox.backends.kubernetes.options import Options
from sandbox.backends.kubernetes.pods import Pods, runs, why_pending
from sandbox.backends.kubernetes.stream import StreamLink
from sandbox.backends.removals import Removals
from sandbox.errors import SandboxError, SandboxGone, SandboxLost, SandboxRefused
from sandbox.files import LineFiles
from sandbox.spec import MB, Isolation
from sandbox.store import Store
from sandbox.workspace import remove_tree

log = logging.getLogger("sandbox")

# Seconds for a pod to be scheduled, its image pulled and its agent heard; to hear an adopted one;
# for an agent to end its sandbox; and for the cluster to forget a pod.
_START_S, _ADOPT_S, _END_S, _GONE_S = 180.0, 15.0, 2.0, 60.0

_NOW = {"gracePeriodSeconds": 0, "propagationPolicy": "Background"}


class PodBox(Box):
    """A sandbox that is a pod."""

    link: StreamLink

    def __init__(
        self,
        info: SandboxInfo,
        workspace: LineFiles,
        link: StreamLink,
        *,
        close: Callable[[], Awaitable[None]],
        prolong: Callable[[float], Awaitable[None]],
    ) -> None:
        """Wraps a pod whose agent is heard; `prolong` gives it a deadline since its start."""
        super().__init__(info, workspace, link, close=close)
        self._prolong = prolong

    async def assign(self, info: SandboxInfo) -> None:
        """Gives a pod that was made for nobody to a caller, and it its lifetime."""
        await self._prolong(info.expires_at - self.info.created_at)
        await super().assign(info)

    async def close(self) -> None:
        """Ends the agent first: a pod that is deleted at once may run on for a while."""
        gone = SandboxGone(f"sandbox {self.info.id} was closed meanwhile.")
        await self.link.end_and_wait(gone, _END_S)
        await super().close()


class KubernetesBackend:
    """Runs commands in pods of a cluster."""

    name = "kubernetes"
    isolation: Isolation = "kubernetes"

    def __init__(
        self,
        options: Options | None = None,
        *,
        state_dir: Path | None = None,
        durable: bool = False,
    ) -> None:
        """Describes the backend; `start` connects it.

        Args:
            options: Which cluster, and what its pods are like.
            state_dir: Where the store is; None is a directory in the temporary one.
            durable: Whether sandboxes outlive a service that is killed, for the next to adopt.
        """
        self._options = options or Options()
        self._state_dir = (state_dir or owner.default_state_dir()) / "kubernetes"
        self._durable = durable
        self._taken_over: list[Path] = []
        self._removals = Removals()
        self.reaped = 0
        core = f"/api/v1/namespaces/{self._options.namespace}"
        self._pods_path, self._maps_path = f"{core}/pods", f"{core}/configmaps"

    async def start(self) -> list[Box]:
        """Connects to the cluster and reaps or adopts what dead services left."""
        options = self._options
        self.api = await Api.connect(options.kubeconfig, at_once=options.requests_at_once)
        try:
            return await self._start()
        except BaseException:
            await self.api.close()
            raise

    async def _start(self) -> list[Box]:
        self._version: str = (await self.api.request("GET", "/version"))["gitVersion"]
        self.own = owner.claim(self._state_dir, durable=self._durable)
        self.store = Store(self._state_dir / "store.db")
        self._labels = {
            pods_of.STATE: _identity(self._state_dir),
            pods_of.OWNER: owner.this_process(),
        }
        selector = f"{pods_of.STATE}={self._labels[pods_of.STATE]}"
        self.pods = Pods(self.api, self._pods_path, selector)
        await self.pods.start()
        self._map = pods_of.map_name(self.own.name)
        inherited = await inherit(
            self._state_dir,
            self.store,
            durable=self._durable,
            adopt=lambda directory, record: self._attach(directory, record, _ADOPT_S),
            reap=lambda directory, _: self._discard(directory),
            lives=lambda directory, _: self._runs(directory.name),
        )
        self._taken_over, self.reaped = inherited.directories, inherited.reaped
        await self._reap_objects(selector)
        await self._create(self._maps_path, pods_of.agent_map(self._map, self._labels))
        return inherited.boxes

    async def create(self, info: SandboxInfo) -> Box:
        """Makes a pod."""
        uid = random.SystemRandom().randint(owner.FIRST_UID, owner.LAST_UID)
        # What waits for a caller gets its deadline with its caller.
        waiting = self.store.is_waiting(info.id)
        manifest = pods_of.pod(
            info.id,
            info,
            self._options,
            uid=uid,
            labels={**self._labels, pods_of.SANDBOX: info.id},
            agent=self._map,
            lives_s=None if waiting else info.spec.lifetime_s,
            durable=self._durable,
        )
        directory = self.own / info.id
        directory.mkdir()
        record = owner.Record(info, uid=uid)
        self.store.write(directory.name, record)
        try:
            await self._create(self._pods_path, manifest)
            return await self._attach(directory, record, _START_S)
        except BaseException:
            await asyncio.shield(self._discard(directory))
            raise

    async def close(self) -> None:
        """Removes what the service itself has in the cluster and on this host."""
        await self._removals.close()
        with suppress(SandboxError):
            await self.api.request("DELETE", f"{self._maps_path}/{self._map}")
        await self.pods.close()
        for own in (self.own, *self._taken_over):
            await asyncio.to_thread(remove_tree, own)
        self.store.close()
        await self.api.close()

    def health(self) -> dict[str, Any]:
        """How limits are held, and where."""
        return {
            "limits": "resources of the pod, rlimits of its user",
            "disk": "size of an emptyDir: a pod that is over it is evicted",
            "kubernetes": self._version,
            "namespace": self._options.namespace,
            "runtime_class": self._options.runtime_class,
            "throttled": self.api.throttled,
        }

    async def _create(self, path: str, manifest: dict[str, Any]) -> None:
        """Makes an object, once: a try whose answer was lost is known by its owner."""
        try:
            await self.api.request("POST", path, manifest)
        except Conflict:
            name = manifest["metadata"]["name"]
            there = (await self.api.request("GET", f"{path}/{name}"))["metadata"]
            if (there.get("labels") or {}) != manifest["metadata"]["labels"]:
                raise SandboxRefused(
                    f"there is an object {name} of another in the namespace; choose another id."
                ) from None

    def _runs(self, name: str) -> bool:
        with suppress(SandboxError):
            return runs(self.pods.known.get(name))
        return False

    async def _attach(self, directory: Path, record: owner.Record, patience_s: float) -> Box:
        """A sandbox whose pod was made, once its agent is heard."""
        name, spec = directory.name, record.info.spec
        deadline = asyncio.get_running_loop().time() + patience_s
        try:
            async with asyncio.timeout_at(deadline):
                await self.pods.until(name, runs)
        except TimeoutError:
            said = why_pending(self.pods.known.get(name))
            raise SandboxError(f"the pod of the sandbox does not start.{said}") from None
        payload = max(2 * spec.limits.output_bytes, CHUNK)
        link = StreamLink(self.api, f"{self._pods_path}/{name}/exec", max_payload=payload)
        end_watch = self.pods.listen(name, functools.partial(_fail_at_its_end, link))
        try:
            async with asyncio.timeout_at(deadline):
                await link.dialled()
        except BaseException as error:
            end_watch()
            link.fail(SandboxLost("the sandbox did not start."))
            if isinstance(error, TimeoutError):
                said = f" It said: {link.said}" if link.said else ""
                raise SandboxError(f"the agent of the sandbox is not heard.{said}") from None
            raise

        async def close() -> None:
            end_watch()
            await self._discard(directory)

        async def prolong(lives_s: float) -> None:
            body = {"spec": {"activeDeadlineSeconds": pods_of.deadline_s(lives_s)}}
            await self.api.request("PATCH", f"{self._pods_path}/{name}", body)

        workspace = LineFiles(link, root="/workspace", max_bytes=spec.limits.files_mb * MB)
        return PodBox(record.info, workspace, link, close=close, prolong=prolong)

    async def _discard(self, directory: Path) -> None:
        await self._removals.run(functools.partial(self._remove, directory))

    async def _remove(self, directory: Path) -> None:
        await self._delete_pod(directory.name)
        await clear(directory, self.store)

    async def _delete_pod(self, name: str) -> None:
        """Deletes a pod; returns when the cluster has forgotten it."""
        with suppress(SandboxGone):
            answer = await self.api.request("DELETE", f"{self._pods_path}/{name}", _NOW)
            if answer.get("kind") == "Pod" and name in self.pods.known:
                async with asyncio.timeout(_GONE_S):
                    await self.pods.until(name, lambda pod: pod is None)

    async def _reap_objects(self, selector: str) -> None:
        """Removes what dead services of this state directory have in the cluster alone."""
        for name, pod in list(self.pods.known.items()):
            kept = list(self._state_dir.glob(f"*/{name}"))
            if not kept and not owner.is_alive(_label(pod, pods_of.OWNER)):
                log.info("reaping pod %s of a dead service", name)
                await self._delete_pod(name)
        maps = await self.api.request("GET", self._maps_path, labelSelector=selector)
        for found in maps["items"]:
            if not owner.is_alive(_label(found, pods_of.OWNER)):
                with suppress(SandboxGone):
                    name = found["metadata"]["name"]
                    await self.api.request("DELETE", f"{self._maps_path}/{name}")


def _fail_at_its_end(link: StreamLink, pod: Json | None) -> None:
    try:
        runs(pod)
    except SandboxError as error:
        link.fail(SandboxLost(str(error)))


def _label(found: Json, name: str) -> str:
    return str((found["metadata"].get("labels") or {}).get(name, ""))


def _identity(state_dir: Path) -> str:
    """What names a state directory in a cluster, where others have theirs."""
    path = state_dir / "id"
    with suppress(FileExistsError):
        fresh = state_dir / f"id.{secrets.token_hex(4)}"
        fresh.write_text(secrets.token_hex(8))
        try:
            path.hardlink_to(fresh)
        finally:
            fresh.unlink()
    return path.read_text()
