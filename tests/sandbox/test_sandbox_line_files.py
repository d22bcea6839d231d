"""Files that go over the agent's line, for backends whose workspaces are on other machines."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from sandbox_helpers import make_backend, require

from sandbox.api import ExecRequest, SandboxInfo
from sandbox.backends import Box
from sandbox.errors import SandboxFileMissing, SandboxRefused, SandboxTooLarge
from sandbox.files import LineFiles
from sandbox.spec import Limits, SandboxSpec, new_id


def _over_the_line(state_dir: Path, body: Callable[[Box, LineFiles], Awaitable[None]]) -> None:
    require("local-bubblewrap")

    async def main() -> None:
        backend = make_backend("local-bubblewrap", state_dir)
        await backend.start()
        now = time.time()
        spec = SandboxSpec(limits=Limits(files_mb=3))
        info = SandboxInfo(new_id(), "local", "bubblewrap", now, now + 600, spec)
        box = await backend.create(info)
        try:
            await body(box, LineFiles(box.link, root="/workspace", max_bytes=2_000_000))
        finally:
            await box.close()
            await backend.close()

    asyncio.run(main())


def test_what_is_written_is_the_commands_and_read_again(state_dir: Path) -> None:
    async def body(box: Box, files: LineFiles) -> None:
        for size in (0, 1, 1 << 19, 1_900_000):
            data = os.urandom(size)
            await asyncio.to_thread(files.write, "a/ü b", io.BytesIO(data))
            assert await asyncio.to_thread(files.read, "a/ü b") == data
        assert (await box.exec(ExecRequest("wc -c <'a/ü b'"))).stdout == "1900000\n"
        # Beside commands, and by the same bytes as from outside.
        running = asyncio.create_task(box.exec(ExecRequest("sleep 0.3; mkfifo p; ln -s /etc l")))
        here, there = io.BytesIO(), io.BytesIO()
        await asyncio.gather(*(asyncio.to_thread(files.read, "a/ü b") for _ in range(5)))
        await running
        await asyncio.to_thread(files.pack, there)
        await asyncio.to_thread(box.workspace.pack, here)
        assert there.getvalue() == here.getvalue()
        await box.exec(ExecRequest("rm -r a l p"))
        there.seek(0)
        await asyncio.to_thread(files.unpack, there)
        assert (await box.exec(ExecRequest("ls; readlink l; cat a/* | wc -c"))).stdout == (
            "a\nl\n/etc\n1900000\n"
        )

    _over_the_line(state_dir, body)


def _tar(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        tar.addfile(member)
    return io.BytesIO(out.getvalue())


def test_what_is_no_file_or_leads_elsewhere_or_is_too_large_is_refused(state_dir: Path) -> None:
    async def refused(error: type[Exception], call: Callable[..., object], *args: object) -> None:
        with pytest.raises(error):
            await asyncio.to_thread(call, *args)

    async def body(box: Box, files: LineFiles) -> None:
        await box.exec(ExecRequest("mkdir dir; ln -s /tmp up; mkfifo fifo; mknod z c 1 5"))
        for path in ("../x", "/etc/passwd", "up/x", "up", "fifo", "dir", "", "nul\0"):
            await refused(SandboxRefused, files.read, path)
            # More than the sockets hold: the end comes before all is read.
            await refused(SandboxRefused, files.write, path, io.BytesIO(bytes(1_500_000)))
        await refused(SandboxFileMissing, files.read, "none")
        for path in ("up", "fifo", "..", "/"):
            with pytest.raises(SandboxRefused):
                await files.check_directory(path)
        await files.check_directory("dir")
        await files.check_directory(".")
        for archive in (
            _tar("../evil"),
            _tar("/tmp/evil"),
            _tar("up/evil"),
            _tar("c", tarfile.CHRTYPE),
            _tar("f", tarfile.FIFOTYPE),
            _tar("h", tarfile.LNKTYPE, "/etc/passwd"),
            io.BytesIO(b"this is no tar" * 100_000),
        ):
            await refused(SandboxRefused, files.unpack, archive)
        await box.exec(ExecRequest("truncate -s 2500000 big"))
        await refused(SandboxTooLarge, files.read, "big")
        await refused(SandboxTooLarge, files.pack, io.BytesIO())
        assert (await box.exec(ExecRequest("ls -A; find /tmp -name evil"))).stdout.split() == [
            "big",
            "dir",
            "fifo",
            "up",
        ]

    _over_the_line(state_dir, body)
