"""Small things that sandbox tests share."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from sandbox.backends import Backend, open_backend
from sandbox.backends.docker import DEFAULT_IMAGE
from sandbox.client import Sandbox, SandboxClient, SandboxSpec

T = TypeVar("T")

ROOT = Path(__file__).parents[2]

BACKENDS = {
    "local-bubblewrap": ("local", "bubblewrap"),
    "local-plain": ("local", "none"),
    "docker": ("docker", "auto"),
}

# `package.module:function` of one's own: takes the state directory, returns a backend that is not
# started. Every test with the fixture `service` then runs against it, too.
OTHER_BACKEND = os.environ.get("KLONG_SANDBOX_BACKEND")


def make_backend(kind: str, state_dir: Path) -> Backend:
    """A backend of a kind, not started yet."""
    if kind == "other":
        assert OTHER_BACKEND is not None
        module, _, function = OTHER_BACKEND.partition(":")
        made: Backend = getattr(importlib.import_module(module), function)(state_dir)
        return made
    name, isolation = BACKENDS[kind]
    return open_backend(name, isolation=isolation, state_dir=state_dir)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Service:
    kind: str
    url: str
    state_dir: Path

    @property
    def isolated(self) -> bool:
        return self.kind != "local-plain"


def _missing(kind: str) -> str | None:
    """What this machine lacks for a kind of backend."""
    if kind == "local-bubblewrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    if kind == "docker":
        if shutil.which("docker") is None:
            return "docker is not installed"
        probe = ["docker", "image", "inspect", DEFAULT_IMAGE]
        if subprocess.run(probe, capture_output=True, check=False).returncode:
            return f"no docker daemon with the image {DEFAULT_IMAGE}: run .ci/services.sh"
    return None


def require(kind: str) -> None:
    """Skips where the machine lacks a backend; in CI, which installs them all, fails."""
    missing = _missing(kind)
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)


@contextmanager
def open_directory() -> Iterator[Path]:
    """A temporary directory that other users can pass, as a state directory must be."""
    path = Path(tempfile.mkdtemp(prefix="klong-test-", dir="/tmp"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        left = [mount for mount in mounts if mount.startswith(f"{path}/")]
        for mount in left:
            subprocess.run(["umount", "--lazy", mount], check=True)
        shutil.rmtree(path)
        assert left == [], "sandboxes are left, with disks of their own"


_EMBEDDED = """
import sys, time
from pathlib import Path
from sandbox.service import embedded
backend, isolation, state_dir = sys.argv[1:]
with embedded(backend, isolation=isolation, state_dir=Path(state_dir)) as url:
    print(url, flush=True)
    time.sleep(60)
"""


@contextmanager
def serving(
    kind: str,
    state_dir: Path,
    *,
    embedded: bool = False,
    port: int = 0,
    pool: int = 0,
    egress: Path | None = None,
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service in a process of its own, and its URL."""
    if kind not in BACKENDS:
        pytest.skip("another backend is not served by the command line")
    backend, isolation = BACKENDS[kind]
    command = [sys.executable, "-m", "sandbox", "serve", "--port", str(port), "--backend", backend]
    command += ["--pool", str(pool)]
    command += ["--isolation", isolation, "--state-dir", str(state_dir)]
    command += [] if egress is None else ["--egress", str(egress)]
    if embedded:
        command = [sys.executable, "-c", _EMBEDDED, backend, isolation, str(state_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = re.search(r"http://\S+", process.stdout.readline())
        assert url is not None
        yield process, url[0]
    finally:
        # Killed, it would leave its sandboxes, for a day if no service follows.
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


_numbers = itertools.count()


def in_box(url: str, body: Callable[[Sandbox], Awaitable[T]], spec: SandboxSpec | None = None) -> T:
    """Runs a test's body with a fresh sandbox."""

    async def main() -> T:
        async with SandboxClient(url) as client, await client.create(spec) as box:
            return await body(box)

    return asyncio.run(main())


def unique_sleep() -> str:
    """A `sleep` argument that no other process of this machine has."""
    return f"{100_000 + os.getpid()}.{next(_numbers):04d}"


def sleepers(argument: str) -> list[int]:
    """Processes of this machine, in any namespace, that carry the argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if argument.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 20.0) -> bool:
    """Whether the condition comes to hold in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()
