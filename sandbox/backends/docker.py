"""Sandboxes as Docker containers: one hardened container a sandbox, one exec a command.

Workspace and home are directories of this host mounted into the container, so files never go
through the daemon; the daemon must therefore run on this host.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import requests
from docker.client import DockerClient
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import LogConfig, Mount, Ulimit

from sandbox import owner
from sandbox.api import MB, ExecRequest, ExecResult, Isolation, SandboxSpec
from sandbox.backends.bubblewrap import ENV
from sandbox.errors import SandboxError, SandboxGone, SandboxRefused, SandboxUnavailable
from sandbox.output import HeadTail
from sandbox.workspace import Workspace, remove_tree, split_path

log = logging.getLogger("sandbox")

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_IMAGE = "klong/base:bookworm"
_LABEL, _OWNER, _HOST = "klong.sandbox", "klong.owner", "klong.host"
# A running command holds a thread, and a connection to the daemon.
_THREADS = 128
_INPUTS = "/run/klong"

# The container's first process belongs to root without capabilities, commands to another user:
# they cannot signal or trace it, and a signal to "all" spares it.
_IDLE = ["/bin/sh", "-c", "while :; do sleep 86400; done"]
# `kill -9 -1` spares only the shell that says it and what other users run.
_RUN = '/bin/sh -c "$1" <"$2"; code=$?; kill -9 -1 2>/dev/null; exit $code'


class DockerBackend:
    """Runs commands in containers of a Docker daemon on this host."""

    name = "docker"
    isolation: Isolation = "docker"

    def __init__(self, *, state_dir: Path | None = None) -> None:
        """Describes the backend; `start` connects it.

        Args:
            state_dir: Where workspaces live; None is a directory in the temporary one.
        """
        self._state_dir = (state_dir or owner.default_state_dir()) / "docker"
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="docker")
        self.uid = 1000 if os.geteuid() == 0 else os.geteuid()

    async def start(self) -> None:
        """Connects to the daemon and reaps what dead services left."""
        try:
            self.client = await self.call(DockerClient.from_env, max_pool_size=_THREADS)
            version = await self.call(self.client.version)
        except DockerException as error:
            raise SandboxUnavailable(f"no Docker daemon answers: {error}.") from None
        self._version: str = version["Version"]
        await self.call(self._reap)
        self.own = owner.claim(self._state_dir)

    async def create(self, sandbox_id: str, spec: SandboxSpec) -> DockerBox:
        """Starts a container."""
        directory = owner.make_box_directory(self.own, sandbox_id, self.uid)
        (directory / "inputs").mkdir()
        (directory / "inputs").chmod(0o755)
        try:
            container = await self.call(self._start_container, sandbox_id, spec, directory)
        except BaseException:
            await asyncio.to_thread(remove_tree, directory)
            raise
        return DockerBox(self, container, spec, directory)

    async def close(self) -> None:
        """Removes the service's directory and closes the connections."""
        await asyncio.to_thread(remove_tree, self.own)
        self.client.close()
        self._threads.shutdown(wait=False)

    def health(self) -> dict[str, Any]:
        """How limits are held."""
        return {"limits": "cgroup of the container", "docker": self._version}

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a blocking call of the SDK in a thread, with its errors as this package's."""
        bound = functools.partial(function, *args, **kwargs)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, bound)
        except ImageNotFound:
            raise SandboxRefused(
                "image: the Docker daemon does not have it; pull it, or build the default one "
                "with launch/sandbox_image.sh."
            ) from None
        except NotFound:
            raise SandboxGone("the container of the sandbox is gone.") from None
        except APIError as error:
            if error.status_code == 409:
                raise SandboxGone("the container of the sandbox has stopped.") from None
            raise SandboxError(f"Docker answers: {error.explanation}.") from error
        except requests.ConnectionError as error:
            raise SandboxUnavailable("the Docker daemon does not answer any more.") from error

    def _start_container(self, sandbox_id: str, spec: SandboxSpec, directory: Path) -> str:
        limits = spec.limits
        memory, size = limits.memory_mb * MB, limits.files_mb * MB
        api = self.client.api
        mounts = [
            Mount("/workspace", str(directory / "workspace"), type="bind"),
            Mount(ENV["HOME"], str(directory / "home"), type="bind"),
            Mount(_INPUTS, str(directory / "inputs"), type="bind", read_only=True),
        ]
        host = api.create_host_config(
            mounts=mounts,
            network_mode="bridge" if spec.network else "none",
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            init=True,
            mem_limit=memory,
            memswap_limit=memory,
            nano_cpus=int(limits.cpus * 1e9),
            pids_limit=limits.pids,
            ulimits=[Ulimit(name="fsize", soft=size, hard=size), Ulimit(name="core", hard=0)],
            log_config=LogConfig(type="none"),
        )
        labels = {_LABEL: sandbox_id, _OWNER: owner.this_process(), _HOST: socket.gethostname()}
        made = api.create_container(
            spec.image or DEFAULT_IMAGE,
            entrypoint=_IDLE[:1],
            command=_IDLE[1:],
            user="0:0",
            labels=labels,
            host_config=host,
            healthcheck={"test": ["NONE"]},
        )
        try:
            api.start(made["Id"])
        except APIError:
            api.remove_container(made["Id"], force=True)
            raise
        return str(made["Id"])

    def _reap(self) -> None:
        api = self.client.api
        labels = [_OWNER, f"{_HOST}={socket.gethostname()}"]
        for container in api.containers(all=True, filters={"label": labels}):
            if not owner.is_alive(container["Labels"][_OWNER]):
                log.info("reaping sandbox %s of a dead service", container["Labels"][_LABEL])
                api.remove_container(container["Id"], force=True)
        for dead in owner.abandoned(self._state_dir):
            remove_tree(dead)


class DockerBox:
    """One container."""

    def __init__(
        self, backend: DockerBackend, container: str, spec: SandboxSpec, directory: Path
    ) -> None:
        """Wraps a running container."""
        self.workspace = Workspace(
            directory / "workspace",
            owner=backend.uid if os.geteuid() == 0 else None,
            max_bytes=spec.limits.files_mb * MB,
        )
        self._backend, self._container = backend, container
        self._spec, self._directory = spec, directory
        # What ends a command ends every process of the container's user: one at a time.
        self._turn = asyncio.Lock()

    async def exec(self, request: ExecRequest) -> ExecResult:
        """Runs one command, after those that already wait."""
        self.workspace.directory(request.cwd)
        async with self._turn:
            given = self._directory / "inputs" / secrets.token_hex(8)
            if request.stdin:
                await asyncio.to_thread(given.write_text, request.stdin)
            try:
                return await self._exec(request, given.name if request.stdin else None)
            finally:
                given.unlink(missing_ok=True)

    async def _exec(self, request: ExecRequest, given: str | None) -> ExecResult:
        started = time.monotonic()
        limit = request.output_bytes or self._spec.limits.output_bytes
        out, err = HeadTail(limit), HeadTail(limit)
        api = self._backend.client.api
        stdin = "/dev/null" if given is None else f"{_INPUTS}/{given}"

        given_up = threading.Event()

        def stream() -> int | None:
            made = api.exec_create(
                self._container,
                ["/bin/sh", "-c", _RUN, "sh", request.command, stdin],
                user=f"{self._backend.uid}:{self._backend.uid}",
                workdir="/".join(["/workspace", *split_path(request.cwd)]),
                environment=self._env(request),
            )
            if given_up.is_set():
                return None
            for out_data, err_data in api.exec_start(made["Id"], stream=True, demux=True):
                out.feed(out_data or b"")
                err.feed(err_data or b"")
            code: int = api.exec_inspect(made["Id"])["ExitCode"]
            return code

        # `wait` lets the stream's thread finish: it reads until the kill below ends its command.
        running = asyncio.ensure_future(self._backend.call(stream))
        timed_out = False
        try:
            done, _ = await asyncio.wait({running}, timeout=request.timeout_s)
            timed_out = not done
        finally:
            given_up.set()
            while not running.done():
                # Restarting needs no free process slot inside and leaves none alive. Again if
                # the command started only after it.
                await self._backend.call(api.restart, self._container, timeout=0)
                await asyncio.wait({running}, timeout=1)
        if timed_out:
            # How the cut stream ended, perhaps with an error, says nothing more.
            running.exception()
        return ExecResult(
            exit_code=None if timed_out else running.result(),
            stdout=out.text(),
            stderr=err.text(),
            timed_out=timed_out,
            duration_s=time.monotonic() - started,
            stdout_bytes=out.total,
            stderr_bytes=err.total,
        )

    async def close(self) -> None:
        """Removes the container and the directories."""
        api = self._backend.client.api
        await self._backend.call(api.remove_container, self._container, force=True)
        await asyncio.to_thread(remove_tree, self._directory)

    def _env(self, request: ExecRequest) -> dict[str, str]:
        # The image knows its own PATH.
        env = {name: value for name, value in ENV.items() if name != "PATH"}
        return {**env, **self._spec.env, **request.env}
