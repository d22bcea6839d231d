"""The contract of files and trees, the same for every backend, and the trees' format."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sandbox_helpers import Service, in_box

from sandbox.archive import pack, unpack
from sandbox.client import (
    Limits,
    Sandbox,
    SandboxError,
    SandboxFileMissing,
    SandboxRefused,
    SandboxSpec,
    SandboxTooLarge,
)
from sandbox.workspace import Workspace, remove_tree


def test_a_written_file_is_the_commands_own(service: Service) -> None:
    data = os.urandom(1_500_000)

    async def body(box: Sandbox) -> None:
        await box.write("a/ü b/data", data)
        assert await box.read("a/ü b/data") == data
        digest = (await box.exec("sha256sum <'a/ü b/data'")).stdout.split()[0]
        assert digest == hashlib.sha256(data).hexdigest()
        # Commands may change and remove what was written from outside, directories too.
        change = await box.exec("echo new >'a/ü b/data' && mv a c && rm -r 'c/ü b' && echo x >c/y")
        assert change.exit_code == 0, change.stderr
        assert await box.read("c/y") == b"x\n"
        with pytest.raises(SandboxFileMissing, match="a/ü b/data"):
            await box.read("a/ü b/data")

    in_box(service.url, body)


def test_writing_keeps_permissions_and_breaks_hard_links(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        await box.exec("echo 'echo one' >run; chmod 750 run; ln run other")
        await box.write("run", "echo two")
        assert (await box.exec("./run")).stdout == "two\n"
        assert await box.read("other") == b"echo one\n"
        assert (await box.exec("stat -c %a run")).stdout == "750\n"

    in_box(service.url, body)


def test_paths_that_leave_the_workspace_or_are_no_files(service: Service) -> None:
    outside = ["../x", "/etc/passwd", "a/../../x", "a/..", "", ".", "up/passwd", "link", "nul\0"]

    async def body(box: Sandbox) -> None:
        await box.exec("mkdir dir; ln -s /etc up; ln -s ../../../../etc/passwd link; mkfifo fifo")
        for path in [*outside, "fifo", "dir"]:
            with pytest.raises(SandboxRefused, match="path"):
                await box.read(path)
            with pytest.raises(SandboxRefused, match="path"):
                await box.write(path, "x")
        assert (await box.exec("ls -A")).stdout.split() == ["dir", "fifo", "link", "up"]

    in_box(service.url, body)


def test_sizes_are_limited(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        with pytest.raises(SandboxTooLarge, match="2000000"):
            await box.write("big", b"x" * 2_000_001)
        with pytest.raises(SandboxTooLarge, match="2000000"):
            await box.upload_tree({"big": b"x" * 2_000_000})
        await box.exec(
            "for n in 1 2; do head -c 1500000 /dev/zero >$n; done; truncate -s 1900000 s"
        )
        assert len(await box.read("s")) == 1_900_000
        with pytest.raises(SandboxTooLarge, match="2000000"):
            await box.download_tree()
        assert (await box.exec("ls -A")).stdout.split() == ["1", "2", "s"]

    in_box(service.url, body, SandboxSpec(limits=Limits(files_mb=2)))


def test_a_tree_round_trips_with_equal_bytes(service: Service) -> None:
    make = """
        mkdir -p empty deep/er; echo hi >deep/er/f; echo '#!/bin/sh' >run; chmod 755 run
        ln -s deep/er/f link; ln -s /usr/bin/env away; touch "$(printf 'sp ace\\nline')"; mkfifo p
    """

    async def body(box: Sandbox) -> None:
        assert (await box.exec(make)).exit_code == 0
        first = await box.download_tree()

        async def again(other: Sandbox) -> None:
            await other.upload_tree(first)
            assert await other.download_tree() == first
            seen = await other.exec("./run && cat link && readlink away && ls -A | wc -l")
            assert seen.stdout == "hi\n/usr/bin/env\n7\n", seen.stderr

        async with await box._client.create() as other:
            await again(other)
        with tarfile.open(fileobj=io.BytesIO(first)) as tar:
            members = tar.getmembers()
        assert [m.name for m in members] == sorted(m.name for m in members)
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
        assert "p" not in [m.name for m in members]

    in_box(service.url, body)


def test_equal_trees_have_equal_bytes_however_they_came_to_be(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        await box.exec(
            "echo 2 >b; mkdir d; echo 1 >a; sleep 0.01; touch -d 1999-01-01 b; echo 3 >d/c"
        )
        one = await box.download_tree()
        await box.exec("rm -r *")
        await box.upload_tree({"d/c": "3\n", "a": "1\n", "b": b"2\n"})
        assert await box.download_tree() == one
        await box.write("a", "x\n")
        assert await box.download_tree() != one

    in_box(service.url, body)


def test_uploads_add_to_what_is_there(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        await box.upload_tree({"kept": "1", "d/changed": "1"})
        await box.upload_tree({"d/changed": "2", "d/new": "2"})
        assert (await box.exec("cat kept d/changed d/new")).stdout == "122"

    in_box(service.url, body)


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    "archive",
    [
        _tar((_member("../evil"), b"x")),
        _tar((_member("/tmp/evil"), b"x")),
        _tar((_member("a", tarfile.SYMTYPE, "/tmp"), b""), (_member("a/evil"), b"x")),
        _tar((_member("a", tarfile.SYMTYPE, ".."), b""), (_member("a/evil"), b"x")),
        _tar((_member("a", tarfile.SYMTYPE, "/tmp"), b""), (_member("a", tarfile.DIRTYPE), b"")),
        _tar((_member("a", tarfile.LNKTYPE, "/etc/passwd"), b"")),
        _tar((_member("a", tarfile.CHRTYPE), b"")),
        b"this is no tar" * 100,
        _tar((_member("a"), b"x" * 5000))[:2000],
    ],
    ids=lambda archive: hashlib.sha256(archive).hexdigest()[:4],
)
def test_hostile_archives_are_refused(service: Service, archive: bytes) -> None:
    async def body(box: Sandbox) -> None:
        with pytest.raises(SandboxRefused):
            await box.upload_tree(archive)
        assert not Path("/tmp/evil").exists()
        assert not list(service.state_dir.rglob("evil"))
        assert (await box.exec("find / -xdev -name evil 2>/dev/null")).stdout == ""

    in_box(service.url, body)


def test_hard_links_in_an_archive_become_copies_that_count(service: Service) -> None:
    links = [(_member(str(n), tarfile.LNKTYPE, "a"), b"") for n in range(3)]
    archive = _tar((_member("a"), b"x" * 900_000), *links)

    async def body(box: Sandbox) -> None:
        with pytest.raises(SandboxTooLarge):
            await box.upload_tree(archive)
        assert await box.read("0") == b"x" * 900_000

    in_box(service.url, body, SandboxSpec(limits=Limits(files_mb=2)))


_NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
_PATHS = st.lists(_NAMES.filter(lambda n: n not in (".", "..")), min_size=1, max_size=3).map(
    "/".join
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(_PATHS.filter(lambda p: len(p.encode()) < 200), st.binary(max_size=2000)))
def test_any_tree_survives_packing(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        source = Workspace(Path(one), owner=None, max_bytes=10**6)
        target = Workspace(Path(two), owner=None, max_bytes=10**6)
        written: dict[str, bytes] = {}
        for path, data in files.items():
            try:
                source.write(path, io.BytesIO(data))
            except SandboxError:
                continue  # A file where another path needs a directory, or the reverse.
            written[path] = data
        archive = io.BytesIO()
        pack(source, archive)
        archive.seek(0)
        unpack(target, archive)
        assert {path: target.read(path) for path in written} == written
        repacked = io.BytesIO()
        pack(target, repacked)
        assert repacked.getvalue() == archive.getvalue()


def test_a_tree_of_any_depth_goes_and_is_too_deep_to_be_packed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    root.mkdir()
    (root / "link").symlink_to(outside)
    place = os.open(root, os.O_RDONLY)
    for _ in range(2000):
        os.mkdir("d", 0o700, dir_fd=place)
        os.symlink(outside, "out", dir_fd=place)
        below = os.open("d", os.O_RDONLY, dir_fd=place)
        os.fchmod(place, 0)
        os.close(place)
        place = below
    os.close(place)
    with pytest.raises(SandboxTooLarge, match="directories deep"):
        pack(Workspace(root, owner=None, max_bytes=10**6), io.BytesIO())
    remove_tree(root)
    assert not root.exists() and (outside / "kept").read_text() == "kept"


def test_links_without_end_are_too_large(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"{number}{'x' * 200}").symlink_to("y" * 200)
    with pytest.raises(SandboxTooLarge, match="limit of 1000 bytes"):
        pack(Workspace(tmp_path, owner=None, max_bytes=1000), io.BytesIO())
