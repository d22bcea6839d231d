"""Faults of the host and of those who call: one typed sentence each, and a service that goes on."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import secrets
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sandbox_helpers import ROOT, in_box, require, serving, wait_until

from sandbox.backends import cgroups
from sandbox.client import (
    Limits,
    Sandbox,
    SandboxClient,
    SandboxError,
    SandboxGone,
    SandboxSpec,
    SandboxTooLarge,
    SandboxUnavailable,
)
from sandbox.errors import BY_KIND, SandboxPaused
from sandbox.service import embedded

root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root may mount and make groups")


def _is_a_fault(error: SandboxError, says: str) -> None:
    text = str(error)
    assert error.infra and re.search(says, text)
    assert text.endswith(".") and "; " in text and "\n" not in text


def test_who_failed_is_told_by_every_kind() -> None:
    agents_own = {"refused", "too_large", "gated", "unfinished", "ended"}
    agents_own |= {"file_missing", "session_ended", "snapshot_missing"}
    assert {kind for kind, cls in BY_KIND.items() if not cls.infra} == agents_own


async def _nothing_left(state_dir: Path) -> bool:
    """Whether no sandbox has a directory, at the latest after removals that failed at first."""

    def gone() -> bool:
        # `os.walk` minds no directory that goes while it looks.
        return not any(
            name.startswith("sb-") for _, names, _ in os.walk(state_dir) for name in names
        )

    return await asyncio.to_thread(lambda: wait_until(gone, timeout_s=15))


@contextmanager
def _small_disk(megabytes: int) -> Iterator[Path]:
    """A directory on a disk of its own."""
    path = Path(f"/tmp/klong-test-disk-{secrets.token_hex(4)}")
    path.mkdir()
    options = f"size={megabytes}m,mode=711"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
        path.rmdir()


def _fill(path: Path) -> None:
    with path.open("ab", buffering=0) as file, suppress(OSError):
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


@root_only
def test_a_full_disk_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    require("local-bubblewrap")

    async def main(url: str, disk: Path) -> None:
        async with SandboxClient(url) as client:
            box = await client.create()
            await box.write("kept", "kept")
            running = asyncio.create_task(box.exec("touch on; until [ -e off ]; do :; done; ls"))
            while b"on" not in await box.download_tree():
                pass
            (workspace,) = disk.glob("*/*/sb-*/data/workspace")
            _fill(disk / "filler")
            for work in (
                client.create(),
                box.write("x", bytes(1_000_000)),
                box.upload_tree({"x": bytes(1_000_000)}),
            ):
                with pytest.raises(SandboxUnavailable) as refused:
                    await work
                _is_a_fault(refused.value, "full|No space left")
            # However much the log has room for, commands are refused in the end, not lost.
            with pytest.raises(SandboxUnavailable) as refused:
                while True:
                    await box.exec(f": {'x' * 2000}")
            _is_a_fault(refused.value, "full")
            assert (await client.health())["status"] == "ok"
            (workspace / "off").touch()
            # What runs already tells how it ended, logged or not.
            assert (await running).stdout == "kept\noff\non\n"
            await box.close()
            assert await _nothing_left(disk)
            (disk / "filler").unlink()
            async with await client.create() as again:
                assert (await again.exec("echo again")).stdout == "again\n"

    with _small_disk(24) as disk, embedded("local", state_dir=disk) as url:
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        asyncio.run(main(url, disk))


@root_only
def test_a_service_does_not_start_on_a_full_disk() -> None:
    with _small_disk(1) as disk:
        _fill(disk / "filler")
        command = [sys.executable, "-m", "sandbox", "serve", "--port", "0", "--state-dir", disk]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"^error: .*(No space left|full).*; .*\.\n\Z", done.stderr, re.MULTILINE)


@contextmanager
def _group_of_processes() -> Iterator[Path]:
    """A control group that limits how many processes its members have."""
    found = cgroups.detect()
    assert found is not None
    above = cgroups.ROOT if found.version == 2 else cgroups.ROOT / "pids"
    path = above / f"klong-test-{secrets.token_hex(4)}"
    path.mkdir()
    try:
        yield path
    finally:
        assert wait_until(lambda: not (path / "cgroup.procs").read_text())
        path.rmdir()


@root_only
def test_a_host_out_of_processes(state_dir: Path) -> None:
    require("local-bubblewrap")

    async def main(url: str, group: Path) -> None:
        async with SandboxClient(url) as client:
            spec = SandboxSpec(limits=Limits(disk_mb=8))
            box = await client.create(spec)
            (group / "pids.max").write_text((group / "pids.current").read_text())
            for asked in (spec, SandboxSpec()):
                with pytest.raises(SandboxUnavailable) as refused:
                    await client.create(asked)
                _is_a_fault(refused.value, "temporarily unavailable|new thread")
            # The sandbox has processes of its own, and the service its threads.
            for n in range(20):
                await box.write(f"x{n}", bytes(1_000_000))
                assert len(await box.read(f"x{n}")) == 1_000_000
                await box.exec(f"rm x{n}")
            await box.close()
            assert await _nothing_left(state_dir)
            (group / "pids.max").write_text("max")
            async with await client.create(spec) as again:
                assert (await again.exec("echo again")).stdout == "again\n"

    with _group_of_processes() as group, serving("local-bubblewrap", state_dir) as (service, url):
        (group / "cgroup.procs").write_text(str(service.pid))
        asyncio.run(main(url, group))
        service.terminate()
        assert service.wait(15) == 0


def test_a_service_out_of_descriptors(state_dir: Path) -> None:
    require("local-plain")

    async def main(url: str, pid: int) -> None:
        async with SandboxClient(url) as client:
            box = await client.create()
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 1, before[1]))
            with pytest.raises(SandboxUnavailable) as refused:
                await client.create()
            _is_a_fault(refused.value, "Too many open files|unable to open")
            assert (await box.exec("echo on")).stdout == "on\n"
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            await box.close()
            async with await client.create() as again:
                assert (await again.exec("echo again")).stdout == "again\n"
        assert await _nothing_left(state_dir)

    with serving("local-plain", state_dir) as (service, url):
        asyncio.run(main(url, service.pid))


def test_what_cannot_be_served_is_said_in_a_line(state_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, says in (
            (["--port", port], f"port {port} of 127.0.0.1 is in use; choose"),
            (["--disk-mb", "3"], "set 8 or more, or 0"),
            (["--host", "no.such.host.invalid", "--token-env", "PATH"], "cannot be served"),
        ):
            command = [sys.executable, "-m", "sandbox", "serve", "--isolation", "none", *options]
            command += ["--state-dir", str(state_dir)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert says in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


class _Relay:
    """A way to the Docker daemon that can be cut: to the service, a daemon that goes and comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._pass_on, self.path)

    async def cut(self) -> None:
        self._server.close()
        for writer in self._open:
            writer.transport.abort()
        self.path.unlink(missing_ok=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_unix_connection("/var/run/docker.sock")

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(1 << 16):
                    target.write(data)
            target.close()

        self._open |= {writer, there[1]}
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))


@pytest.mark.docker
def test_a_docker_daemon_that_goes_and_comes(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("docker")
    path = state_dir / "daemon.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    with (
        pytest.raises(SandboxUnavailable) as refused,
        embedded("docker", state_dir=state_dir),
    ):
        pass
    _is_a_fault(refused.value, "no Docker daemon answers")

    async def main() -> None:
        relay = _Relay(path)
        await relay.start()
        service = embedded("docker", state_dir=state_dir)
        url = await asyncio.to_thread(service.__enter__)
        async with SandboxClient(url) as client:
            box, still = await client.create(), await client.create()
            await still.pause()
            await relay.cut()
            with pytest.raises(SandboxUnavailable) as refused:
                await client.create()
            _is_a_fault(refused.value, "daemon does not answer")
            assert (await box.exec("echo on")).stdout == "on\n"
            with pytest.raises(SandboxUnavailable):
                await still.resume()
            with pytest.raises(SandboxPaused):
                await still.exec("true")
            await relay.start()
            await still.resume()
            assert (await still.exec("echo awake")).stdout == "awake\n"
            await still.close()
            async with await client.create() as again:
                assert (await again.exec("echo again")).stdout == "again\n"
            await box.close()
        await asyncio.to_thread(service.__exit__, None, None, None)
        await relay.cut()
        # The one whose making the daemon did not answer, too.
        assert await _nothing_left(state_dir)

    asyncio.run(main())


def test_requests_over_the_limit() -> None:
    chunk = b"x" * 1_000_000

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(17):
            yield chunk

    async def main(url: str) -> None:
        spec = SandboxSpec(limits=Limits(files_mb=16))
        async with SandboxClient(url) as client, await client.create(spec) as box:
            # As large as the client makes it, which is a request's own fault, not the host's.
            with pytest.raises(SandboxTooLarge):
                await box.exec("cat", stdin="x" * 17_000_000)

            def address(path: str) -> str:
                return f"{url}/{path}" if "sb-" in path else f"{url}/sandboxes/{box.id}/{path}"

            async with aiohttp.ClientSession() as session:
                for method, path in (
                    ("PUT", "sandboxes/sb-12345678"),
                    ("POST", "exec"),
                    ("PUT", "sessions/s"),
                    ("POST", "sessions/s"),
                    ("PUT", "gates"),
                    ("POST", "end"),
                ):
                    bodies: tuple[Callable[[], Any], ...] = (lambda: chunk * 17, chunks)
                    for body in bodies:
                        async with session.request(method, address(path), data=body()) as answer:
                            told = await answer.json()
                            assert (answer.status, told["kind"]) == (413, "too_large"), path
                            assert told["infra"] is False and told["error"].endswith(".")
                for path in ("files?path=x", "archive"):
                    async with session.put(address(path), data=chunks()) as answer:
                        assert answer.status == 413 and "limit" in (await answer.json())["error"]
            assert (await box.exec("ls")).stdout == ""

    with embedded("local") as url:
        asyncio.run(main(url))


async def _metrics(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
        return await answer.text()


def test_what_a_dead_service_left_is_counted_and_logged(state_dir: Path) -> None:
    async def first(url: str) -> str:
        async with SandboxClient(url) as client:
            return (await client.create()).id

    async def second(url: str, sandbox_id: str) -> None:
        reaps = 'klong_sandbox_reaps_total{reason="orphaned"}'
        assert f"{reaps} 1.0" in await _metrics(url)
        async with SandboxClient(url) as client:
            assert (await client.log(sandbox_id))[-1].facts == {"why": "orphaned"}

    with serving("local-bubblewrap", state_dir, embedded=True) as (killed, url):
        sandbox_id = asyncio.run(first(url))
        killed.kill()
        killed.wait()
    with serving("local-bubblewrap", state_dir) as (_, url):
        asyncio.run(second(url, sandbox_id))


def test_a_time_of_day_that_jumps_while_no_service_is_there(state_dir: Path) -> None:
    day = 86_400

    async def first(url: str) -> list[tuple[str, str]]:
        async with SandboxClient(url) as client:
            short = SandboxSpec(lifetime_s=12)
            return [((await client.create()).id, (await client.create(short)).id) for _ in "+-"]

    async def second(url: str, pairs: list[tuple[str, str]]) -> None:
        async with SandboxClient(url) as client:
            assert "klong_sandbox_adoptions_total 4.0" in await _metrics(url)
            for long, _ in pairs:
                box = await client.attach(long)
                assert (await box.exec("echo on")).stdout == "on\n"
                await box.close()
            for _, short in pairs:
                with pytest.raises(SandboxGone):
                    await (await client.attach(short)).exec("sleep 60")
                # By the service: the agent ends it only later.
                assert "expired" in [event.facts.get("why") for event in await client.log(short)]

    with serving("local-bubblewrap", state_dir) as (killed, url):
        pairs = asyncio.run(first(url))
        killed.kill()
        killed.wait()
    with sqlite3.connect(state_dir / "local/store.db") as store:
        for jump_s, boxes in zip((10 * day, -10 * day), pairs, strict=True):
            for box in boxes:
                found = store.execute("SELECT info FROM sandboxes WHERE box = ?", (box,))
                info = json.loads(found.fetchone()[0])
                info["created_at"] -= jump_s
                info["expires_at"] -= jump_s
                changed = json.dumps(info), box
                store.execute("UPDATE sandboxes SET info = ? WHERE box = ?", changed)
    store.close()
    with serving("local-bubblewrap", state_dir) as (service, url):
        asyncio.run(second(url, pairs))
        service.terminate()
        assert service.wait(15) == 0


@root_only
def test_who_asks_for_no_quota_is_given_one(state_dir: Path) -> None:
    async def body(box: Sandbox) -> int:
        assert box.info.spec.limits.disk_mb == 10_000
        return int((await box.exec("df --output=size -B1000000 . | tail -n 1")).stdout)

    with serving("local-bubblewrap", state_dir) as (_, url):
        assert 9_000 < in_box(url, body) <= 10_000
