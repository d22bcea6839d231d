"""Sandboxes as Docker containers: one hardened container each, whose first process is the agent.

Workspace and home are directories of this host mounted into the container, so files never go
through the daemon; the daemon must therefore run on this host.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import requests
from docker.client import DockerClient
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import LogConfig, Mount, Ulimit

from sandbox import owner
from sandbox.api import SandboxInfo
from sandbox.backends import disk, seccomp
from sandbox.backends.base import (
    AGENT_DIR,
    LINE_DIR,
    agent_arguments,
    await_agent,
    clear,
    install_agent,
    open_link,
    open_tree,
    open_workspace,
    shm_bytes,
)
from sandbox.backends.box import Box, Freezer
from sandbox.backends.bubblewrap import ENV, users
from sandbox.backends.inheritance import inherit
from sandbox.backends.removals import Removals
from sandbox.errors import SandboxError, SandboxGone, SandboxRefused, SandboxUnavailable, host_fault
from sandbox.spec import MB, Isolation
from sandbox.store import Store
from sandbox.workspace import remove_tree

log = logging.getLogger("sandbox")

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_IMAGE = "klong/base:bookworm"
_LABEL, _OWNER, _HOST, _STATE = "klong.sandbox", "klong.owner", "klong.host", "klong.state"

_NO_PYTHON = "image: the agent needs Python 3.9 or later in it, with json and ctypes, as python3."
# A creation or removal under way holds a thread, and a connection to the daemon.
_THREADS = 32

# Seconds for an agent to come up, and to dial a service that adopts it.
_START_S, _ADOPT_S = 60.0, 5.0


class DockerBackend:
    """Runs commands in containers of a Docker daemon on this host."""

    name = "docker"
    isolation: Isolation = "docker"

    def __init__(self, *, state_dir: Path | None = None, durable: bool = False) -> None:
        """Describes the backend; `start` connects it.

        Args:
            state_dir: Where workspaces live; None is a directory in the temporary one.
            durable: Whether sandboxes outlive a service that is killed, for the next to adopt.
        """
        self._state_dir = (state_dir or owner.default_state_dir()) / "docker"
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="docker")
        self._durable = durable
        self._taken_over: list[Path] = []
        self.reaped = 0
        self._removals = Removals()

    async def start(self) -> list[Box]:
        """Connects to the daemon and reaps or adopts what dead services left."""
        try:
            self.client = await self._call(DockerClient.from_env, max_pool_size=_THREADS)
            version = await self._call(self.client.version)
        except DockerException as error:
            raise SandboxUnavailable(
                f"no Docker daemon answers: {error}; start dockerd, or serve --backend local."
            ) from None
        self._version: str = version["Version"]
        self.own = owner.claim(self._state_dir, durable=self._durable)
        self.store = Store(self._state_dir / "store.db")
        inherited = await inherit(
            self._state_dir,
            self.store,
            durable=self._durable,
            adopt=lambda directory, record: self._attach(record, directory, _ADOPT_S),
            reap=self._discard,
        )
        self._taken_over, self.reaped = inherited.directories, inherited.reaped
        await self._call(self._reap_containers)
        self.agent = self.own / "agent"
        await asyncio.to_thread(install_agent, self.agent)
        return inherited.boxes

    async def create(self, info: SandboxInfo) -> Box:
        """Starts a container."""
        uid = owner.draw_uid()
        directory = owner.make_box_directory(self.own, info.id)
        record = owner.Record(info, uid=uid)
        self.store.write(directory.name, record)
        try:
            await disk.mount(directory, info.spec.limits)
            owner.make_places(directory, uid)
            await self._call(self._make_container, info, directory, uid or os.geteuid())
            pid = await self._call(self._start_container, info.id)
            started = owner.start_time(pid) or ""
            record = dataclasses.replace(record, pid=pid, started=started)
            self.store.write(directory.name, record)
            return await self._attach(record, directory, _START_S)
        except BaseException:
            await asyncio.shield(self._discard(directory, record))
            raise

    async def close(self) -> None:
        """Removes the service's directories and closes the connections."""
        await self._removals.close()
        for own in (self.own, *self._taken_over):
            await asyncio.to_thread(remove_tree, own)
        self.store.close()
        self.client.close()
        self._threads.shutdown(wait=False)

    def health(self) -> dict[str, Any]:
        """How limits are held."""
        return {"limits": "cgroup of the container", "disk": disk.held(), "docker": self._version}

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a blocking call of the SDK in a thread, with its errors as this package's."""
        bound = functools.partial(function, *args, **kwargs)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, bound)
        except ImageNotFound:
            raise SandboxRefused(
                "image: the Docker daemon does not have it; pull it, or build the default one "
                "with klong sandbox image build."
            ) from None
        except NotFound:
            raise SandboxGone("the container of the sandbox is gone.") from None
        except APIError as error:
            if error.status_code == 409:
                raise SandboxGone("the container of the sandbox has stopped.") from None
            raise SandboxError(f"Docker answers: {error.explanation}.") from error
        except RuntimeError as error:
            raise host_fault(error) from error  # No thread can be started.
        except requests.ConnectionError as error:
            raise SandboxUnavailable(
                "the Docker daemon does not answer any more; start dockerd again."
            ) from error

    def _make_container(self, info: SandboxInfo, directory: Path, uid: int) -> None:
        limits = info.spec.limits
        memory, size = limits.memory_mb * MB, limits.files_mb * MB
        api = self.client.api
        mounts = [
            Mount("/workspace", str(directory / "data/workspace"), type="bind"),
            Mount(ENV["HOME"], str(directory / "data/home"), type="bind"),
            Mount("/tmp", str(directory / "data/tmp"), type="bind"),
            Mount(AGENT_DIR, str(self.agent), type="bind", read_only=True),
            Mount(LINE_DIR, str(directory / "line"), type="bind", read_only=True),
        ]
        for name, text in users(uid).items():
            (directory / name).write_text(text)
            (directory / name).chmod(0o644)
            mounts.append(Mount(f"/etc/{name}", str(directory / name), type="bind", read_only=True))
        host = api.create_host_config(
            mounts=mounts,
            network_mode="bridge" if info.spec.network else "none",
            cap_drop=["ALL"],
            security_opt=["no-new-privileges", f"seccomp={seccomp.docker_profile()}"],
            mem_limit=memory,
            memswap_limit=memory,
            nano_cpus=int(limits.cpus * 1e9),
            pids_limit=limits.pids,
            read_only=True,
            shm_size=shm_bytes(limits),
            ulimits=[
                Ulimit(name="fsize", soft=size, hard=size),
                Ulimit(name="nofile", soft=limits.open_files, hard=limits.open_files),
                Ulimit(name="core", soft=0, hard=0),
            ],
            # Only an agent that cannot start writes there.
            log_config=LogConfig(type="json-file", config={"max-size": "64k", "max-file": "1"}),
        )
        python = ["python3", "-ISB", f"{AGENT_DIR}/__main__.py"]
        api.create_container(
            info.spec.image or DEFAULT_IMAGE,
            name=_name(info.id),
            entrypoint=python[:1],
            command=agent_arguments(python, LINE_DIR, info, durable=self._durable)[1:],
            user=f"{uid}:{uid}",
            working_dir="/workspace",
            # The image knows its own PATH.
            environment={name: value for name, value in ENV.items() if name != "PATH"},
            labels={
                _LABEL: info.id,
                _OWNER: owner.this_process(),
                _STATE: str(self._state_dir),
                _HOST: socket.gethostname(),
            },
            host_config=host,
            healthcheck={"test": ["NONE"]},
        )

    def _start_container(self, sandbox_id: str) -> int:
        """Starts it; returns its first process as this host numbers it, 0 if that ended."""
        api = self.client.api
        try:
            api.start(_name(sandbox_id))
        except APIError as error:
            if "executable file not found" in str(error.explanation):
                raise SandboxRefused(_NO_PYTHON) from None
            raise
        return int(api.inspect_container(_name(sandbox_id))["State"]["Pid"])

    async def _attach(self, record: owner.Record, directory: Path, patience_s: float) -> Box:
        """A sandbox whose container runs, once its agent has dialled."""
        if record.pid == 0:
            said = await self._call(self.client.api.logs, _name(directory.name), tail=1)
            raise SandboxRefused(f"{_NO_PYTHON} It said: {said.decode(errors='replace').strip()}")
        spec = record.info.spec
        link = open_link(directory, spec, record.uid)
        freezer = self._freezer(_name(directory.name))
        await await_agent(
            link,
            record.pid,
            lambda pid: pid == record.pid,
            freezer,
            paused=record.info.paused_at is not None,
            patience_s=patience_s,
            said=str,
        )

        async def close() -> None:
            await self._discard(directory, record)

        workspace = open_workspace(directory, spec, record.uid)
        tree = open_tree(directory, spec.limits, record.uid)
        return Box(record.info, workspace, link, close=close, freezer=freezer, tree=tree)

    def _freezer(self, container: str) -> Freezer:
        api = self.client.api

        async def is_paused() -> bool:
            state = (await self._call(api.inspect_container, container))["State"]
            return bool(state["Paused"])

        async def freeze() -> None:
            if not await is_paused():
                await self._call(api.pause, container)

        async def thaw() -> None:
            with suppress(SandboxGone):
                if await is_paused():
                    await self._call(api.unpause, container)

        return Freezer(freeze, thaw)

    async def _discard(self, directory: Path, record: owner.Record | None) -> None:
        await self._removals.run(functools.partial(self._remove, directory, record))

    async def _remove(self, directory: Path, _record: owner.Record | None) -> None:
        with suppress(SandboxGone):
            await self._call(
                self.client.api.remove_container, _name(directory.name), force=True, v=True
            )
        await disk.unmount(directory)
        await clear(directory, self.store)

    def _reap_containers(self) -> None:
        """Removes containers of dead services whose directories are gone, too."""
        api = self.client.api
        labels = [_OWNER, _STATE, f"{_HOST}={socket.gethostname()}"]
        for container in api.containers(all=True, filters={"label": labels}):
            told = container["Labels"]
            kept = list(Path(told[_STATE]).glob(f"*/{told[_LABEL]}"))
            if not kept and not owner.is_alive(told[_OWNER]):
                log.info("reaping container of sandbox %s of a dead service", told[_LABEL])
                with suppress(NotFound):
                    api.remove_container(container["Id"], force=True)


def _name(sandbox_id: str) -> str:
    return f"klong-{sandbox_id}"
