"""What else runs commands, for `klong bench what=sandbox`: the bare host, Docker's SDK, SWE-ReX."""

import asyncio
import io
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import docker

from sandbox.usage import usage


class BareHost:
    """No sandbox at all: a process of the host a command."""

    name = "limit"

    async def create(self) -> "_Process":
        """Nothing to make."""
        return _Process()


class _Process:
    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="klong-bench-")
        self._file = Path(self._folder.name) / "data"
        self._shell: asyncio.subprocess.Process | None = None

    async def exec(self) -> None:
        # As fast as this interpreter can: without a thread, and without asyncio's bookkeeping.
        argv = ["/bin/sh", "-c", "true"]
        os.waitpid(os.posix_spawn(argv[0], argv, dict(os.environ)), 0)

    async def run(self) -> None:
        if self._shell is None:
            pipe = asyncio.subprocess.PIPE
            self._shell = await asyncio.create_subprocess_exec("bash", stdin=pipe, stdout=pipe)
        assert self._shell.stdin is not None and self._shell.stdout is not None
        self._shell.stdin.write(b"true; echo $?\n")
        await self._shell.stdout.readline()

    async def write(self, data: bytes) -> None:
        self._file.write_bytes(data)

    async def read(self) -> bytes:
        return self._file.read_bytes()

    async def memory(self) -> int:
        raise NotImplementedError

    async def close(self) -> None:
        if self._shell is not None:
            self._shell.kill()
            await self._shell.wait()
        self._folder.cleanup()


class DockerSdk:
    """The Docker SDK: a container that sleeps, and `exec_run` a command."""

    name = "Docker SDK"

    def __init__(self, image: str) -> None:
        """Connects to the daemon."""
        self._image = image
        self._client = docker.from_env(max_pool_size=64)

    async def create(self) -> "_Container":
        """Starts a container that sleeps."""
        made = await asyncio.to_thread(
            self._client.containers.run,
            self._image,
            ["sleep", "infinity"],
            detach=True,
            network_mode="none",
            mem_limit="2g",
            pids_limit=256,
        )
        return _Container(made)


class _Container:
    def __init__(self, container: Any) -> None:
        self._container = container

    async def exec(self) -> None:
        await asyncio.to_thread(self._container.exec_run, ["/bin/sh", "-c", "true"])

    async def run(self) -> None:
        raise NotImplementedError

    async def write(self, data: bytes) -> None:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            member = tarfile.TarInfo("data")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        await asyncio.to_thread(self._container.put_archive, "/tmp", out.getvalue())

    async def read(self) -> bytes:
        chunks, _ = await asyncio.to_thread(self._container.get_archive, "/tmp/data")
        return await asyncio.to_thread(b"".join, chunks)

    async def memory(self) -> int:
        return _container_memory(self._container.id)

    async def close(self) -> None:
        await asyncio.to_thread(self._container.remove, force=True)


class SweRex:
    """SWE-ReX's Docker deployment; its server comes from this interpreter's packages."""

    name = "SWE-ReX"

    def __init__(self, image: str) -> None:
        """Mounts what the server needs where it is here."""
        os.environ.setdefault("SWE_REX_LOG_STREAM_LEVEL", "ERROR")
        packages = [path for path in sys.path if path.endswith("-packages")]
        self._arguments = ["-e", f"PATH={sys.prefix}/bin:/usr/bin:/bin"]
        for path in sorted({sys.prefix, sys.base_prefix, *packages}):
            self._arguments += ["-v", f"{path}:{path}:ro"]
        self._image = image

    async def create(self) -> "_Deployment":
        """Starts a container with its server and waits for it."""
        from swerex.deployment.docker import DockerDeployment

        made = DockerDeployment(image=self._image, pull="never", docker_args=self._arguments)
        await made.start()
        return _Deployment(made)


class _Deployment:
    def __init__(self, deployment: Any) -> None:
        self._deployment = deployment
        self._opened = False

    async def exec(self) -> None:
        from swerex.runtime.abstract import Command

        await self._deployment.runtime.execute(Command(command=["/bin/sh", "-c", "true"]))

    async def run(self) -> None:
        from swerex.runtime.abstract import BashAction, CreateBashSessionRequest

        if not self._opened:
            await self._deployment.runtime.create_session(CreateBashSessionRequest())
            self._opened = True
        await self._deployment.runtime.run_in_session(BashAction(command="true"))

    async def write(self, data: bytes) -> None:
        from swerex.runtime.abstract import WriteFileRequest

        text = data.decode()
        await self._deployment.runtime.write_file(WriteFileRequest(path="/tmp/data", content=text))

    async def read(self) -> bytes:
        from swerex.runtime.abstract import ReadFileRequest

        asked = ReadFileRequest(path="/tmp/data")
        return bytes((await self._deployment.runtime.read_file(asked)).content, "utf-8")

    async def memory(self) -> int:
        return _container_memory(self._deployment.container_name)

    async def close(self) -> None:
        await self._deployment.stop()


def _container_memory(name: str) -> int:
    client = docker.from_env()
    try:
        first = client.api.inspect_container(name)["State"]["Pid"]
    finally:
        client.close()
    return usage([first], minded=True)[first].memory_bytes
