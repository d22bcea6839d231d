"""Snapshots as they are stored: whole or not there, equal for equal trees, checked when read."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sandbox_helpers import ROOT, wait_until

from sandbox.api import SnapshotInfo
from sandbox.backends import disk
from sandbox.errors import (
    SandboxRefused,
    SandboxSnapshotDamaged,
    SandboxSnapshotMissing,
    SandboxTooLarge,
    SandboxUnavailable,
)
from sandbox.look import Look, Shell
from sandbox.snapshots import Snapshots, Stopped
from sandbox.spec import Limits
from sandbox.tree import CHUNK, Entry, HostTree

_SHELLS = (Shell("work", "/workspace/a", {"A": "1\n2", "B": "\udcff"}, ["C"], True),)


def _tree(root: Path, *, max_bytes: int = 10**9, max_entries: int = 10**6) -> HostTree:
    places = {name: root / name for name in ("workspace", "home")}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o700)
        os.utime(place, ns=(0, 0))
    return HostTree(places, owner=None, max_bytes=max_bytes, max_entries=max_entries)


def _take(store: Snapshots, tree: HostTree, shells: tuple[Shell, ...] = ()) -> SnapshotInfo:
    look = Look(shells, 0)
    return store.take(tree.read(), look, sandbox="sb-x", frozen=True, is_stopped=lambda: False)


_NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
_PATHS = st.lists(
    _NAMES.filter(lambda name: name not in (".", "..") and len(name.encode()) < 100),
    min_size=1,
    max_size=3,
)
_BYTES = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda n, b: bytes(n) + b, st.sampled_from([CHUNK, 2 * CHUNK]), st.binary()),
)
_FILES = st.tuples(
    _PATHS,
    st.one_of(
        st.tuples(st.just("file"), _BYTES, st.integers(0o400, 0o777), st.integers(0, 2**60)),
        st.tuples(st.just("symlink"), _NAMES),
        st.tuples(st.just("hardlink"), st.integers(0, 10)),
        st.tuples(st.just("directory")),
        st.tuples(st.just("special")),
    ),
)


def _make(root: Path, files: list[tuple[list[str], Any]]) -> None:
    """Makes what can be made: a file may be where another needs a directory."""
    made: list[Path] = []
    for names, (kind, *facts) in files:
        path = root.joinpath("workspace", *names)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                with open(path, "xb") as file:
                    file.write(facts[0])
                path.chmod(facts[1])
                os.utime(path, ns=(0, facts[2]))
                made.append(path)
            elif kind == "symlink":
                path.symlink_to(facts[0])
            elif kind == "directory":
                path.mkdir()
            elif kind == "special":
                os.mkfifo(path)
            elif made:
                os.link(made[facts[0] % len(made)], path)
        except OSError:
            continue
    # What making took is no part of the tree that is meant.
    for above, directories, names in os.walk(root, topdown=False):
        for name in (*names, *directories):
            path = Path(above, name)
            if path.is_symlink() or path.is_dir():
                os.utime(path, ns=(0, 5), follow_symlinks=False)
        os.utime(above, ns=(0, 0))


def _seen(root: Path) -> dict[str, Any]:
    """All that a snapshot keeps of a tree, by a way of its own."""
    seen: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        found = path.lstat()
        if path.is_fifo():
            continue
        content = os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        names = found.st_nlink if path.is_file() and not path.is_symlink() else 0
        seen[str(path.relative_to(root))] = found.st_mode, found.st_mtime_ns, content, names
    return seen


@settings(max_examples=30, deadline=None)
@given(st.lists(_FILES, max_size=12))
def test_any_tree_comes_back_under_the_same_digest(files: list[tuple[list[str], Any]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        one, two = Path(directory, "one"), Path(directory, "two")
        store, tree, other = Snapshots(Path(directory, "s")), _tree(one), _tree(two)
        _make(one, files)
        info = _take(store, tree, _SHELLS)
        assert tuple(store.restore(info.digest, other.fill)) == _SHELLS
        assert _seen(two) == _seen(one)
        again = _take(store, other, _SHELLS)
        assert (again.digest, again.files, again.bytes) == (info.digest, info.files, info.bytes)
        assert [found.digest for found in store.list()] == [info.digest]
        store.delete(info.digest)
        assert not [path for path in Path(directory, "s").rglob("*/*") if path.is_file()]


def test_the_order_in_which_a_tree_is_listed_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, tree = Snapshots(tmp_path / "s"), _tree(tmp_path)
    for name in ("b", "a", "c/x", "c/y"):
        (tmp_path / "workspace" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "workspace" / name).write_text(name)
    first = _take(store, tree)
    real = os.scandir

    class Reversed:
        def __init__(self, fd: int) -> None:
            self._found = real(fd)

        def __enter__(self) -> Iterator[Any]:
            return reversed(list(self._found))

        def __exit__(self, *_: object) -> None:
            self._found.close()

    monkeypatch.setattr("sandbox.tree.os.scandir", Reversed)
    assert _take(store, tree).digest == first.digest
    os.utime(tmp_path / "workspace/a", ns=(0, 1))
    assert _take(store, tree).digest != first.digest


_WRITER = """
import sys, time
from pathlib import Path
from sandbox.look import Look
from sandbox.snapshots import Snapshots
from sandbox.spec import Limits
from sandbox.tree import CHUNK, Entry

def content(number):
    yield bytes([number]) * CHUNK
    if number == 3:
        print("writing", flush=True)
        time.sleep(60)

entries = (Entry("file", f"workspace/{n}", content=content(n)) for n in range(9))
Snapshots(Path(sys.argv[1])).take(
    entries, Look((), 0), sandbox="sb-x", frozen=True, is_stopped=lambda: False
)
"""


def test_a_killed_writer_leaves_nothing_to_see_and_nothing_for_long(tmp_path: Path) -> None:
    root = tmp_path / "s"
    command = [sys.executable, "-c", _WRITER, str(root)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        store = Snapshots(root)
        # While it lives, nobody takes its blobs for garbage.
        store.recover()
        assert len(list(root.glob("blobs/*/*"))) == 3 and store.list() == []
        writer.kill()
    assert store.list() == [] and len(list(root.glob("blobs/*/*"))) == 3
    Snapshots(root).recover()
    assert not list(root.glob("blobs/*/*")) and not list(root.glob("new/*"))


def test_a_snapshot_that_is_given_up_is_none(tmp_path: Path) -> None:
    store = Snapshots(tmp_path / "s")
    # Of home, of workspace, and before it would be seen.
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        store.take(
            _tree(tmp_path).read(),
            Look((), 0),
            sandbox="sb-x",
            frozen=True,
            is_stopped=lambda: next(asked),
        )
    assert store.list() == [] and not list((tmp_path / "s/new").iterdir())


def test_what_is_being_kept_or_shared_survives_a_deletion(tmp_path: Path) -> None:
    store, other = Snapshots(tmp_path / "s"), Snapshots(tmp_path / "s")
    tree = _tree(tmp_path)
    (tmp_path / "workspace/same").write_text("same")
    first = _take(store, tree)
    (tmp_path / "workspace/more").write_text("more")
    reached, go_on = threading.Event(), threading.Event()

    def slowly() -> Iterator[Entry]:
        for entry in tree.read():
            yield entry
            if entry.path == "workspace/same":
                reached.set()
                go_on.wait(10)

    taken: list[SnapshotInfo] = []
    taker = threading.Thread(
        target=lambda: taken.append(
            store.take(slowly(), Look((), 0), sandbox="y", frozen=True, is_stopped=bool)
        )
    )
    taker.start()
    assert reached.wait(10)
    # It counts on the bytes that were there already.
    deleter = threading.Thread(target=other.delete, args=[first.digest])
    deleter.start()
    assert wait_until(lambda: other.list() == [])
    go_on.set()
    taker.join()
    deleter.join()
    assert [info.digest for info in other.list()] == [taken[0].digest]
    target = tmp_path / "target"
    other.restore(taken[0].digest, _tree(target).fill)
    assert (target / "workspace/same").read_text() == "same"
    with pytest.raises(SandboxSnapshotMissing, match="list those"):
        other.delete(first.digest)


def _damage(root: Path, what: str) -> None:
    if what == "gone":
        for path in root.glob("blobs/*/*"):
            path.unlink()
    else:
        for path in root.glob(f"{what}/**/*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:-3] + b"~~~")


@pytest.mark.parametrize("what", ["blobs", "manifests", "gone"])
def test_damage_is_one_sentence_and_is_mended_by_the_next_snapshot(
    tmp_path: Path, what: str
) -> None:
    store, tree = Snapshots(tmp_path / "s"), _tree(tmp_path)
    (tmp_path / "workspace/a").write_text("precious")
    info = _take(store, tree)
    _damage(tmp_path / "s", what)
    with pytest.raises(SandboxSnapshotDamaged, match=rf"snapshot {info.digest} is damaged: [^.]*"):
        store.restore(info.digest, _tree(tmp_path / "target").fill)
    if what == "blobs":
        # As a loss of power leaves them: there, and too short. Others cannot be told by a look.
        for path in (tmp_path / "s").glob("blobs/*/*"):
            path.write_bytes(b"")
    assert _take(store, tree) != info
    store.restore(info.digest, _tree(tmp_path / "mended").fill)
    assert (tmp_path / "mended/workspace/a").read_text() == "precious"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(state_dir: Path) -> None:
    if (lack := disk.problem()) is not None:
        assert os.environ.get("CI") != "true", lack
        pytest.skip(lack)
    (state_dir / "data").mkdir()
    asyncio.run(disk.mount(state_dir, Limits(disk_mb=8)))
    try:
        store, tree = Snapshots(state_dir / "data/s"), _tree(state_dir / "tree")
        (state_dir / "tree/workspace/a").write_bytes(os.urandom(9_000_000))
        with pytest.raises(SandboxUnavailable, match=r"disk of \S+ is full: delete snapshots"):
            _take(store, tree)
        assert store.list() == [] and not list((state_dir / "data/s/new").iterdir())
        (state_dir / "tree/workspace/a").write_bytes(b"less")
        assert _take(store, tree).bytes == 4
    finally:
        asyncio.run(disk.unmount(state_dir))


@pytest.mark.parametrize("digest", ["", "x" * 64, "../notes/x", "A" * 64])
def test_what_is_no_digest_names_no_file(tmp_path: Path, digest: str) -> None:
    with pytest.raises(SandboxRefused, match="hexadecimal"):
        Snapshots(tmp_path / "s").info(digest)


def test_trees_that_hold_too_much_are_refused(tmp_path: Path) -> None:
    store, inside = Snapshots(tmp_path / "s"), tmp_path / "workspace"
    tree = _tree(tmp_path, max_bytes=3 * CHUNK, max_entries=150)
    with open(inside / "sparse", "wb") as file:
        file.truncate(3 * CHUNK)
    info = _take(store, tree)
    assert info.bytes == 3 * CHUNK
    assert sum(path.stat().st_blocks for path in (tmp_path / "s").glob("blobs/*/*")) < 16
    # Many names of one file are one file.
    for number in range(100):
        os.link(inside / "sparse", inside / f"{number}")
    assert _take(store, tree).bytes == 3 * CHUNK
    (inside / "more").write_text("x")
    with pytest.raises(SandboxTooLarge, match=f"limit of {3 * CHUNK} bytes"):
        _take(store, tree)
    for number in range(100):
        (inside / f"e{number}").touch()
    with pytest.raises(SandboxTooLarge, match="more than 150 files"):
        _take(store, tree)


def test_a_tree_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    tree, store = _tree(tmp_path), Snapshots(tmp_path / "s")
    (tmp_path / "workspace" / "/".join(["d"] * 99)).mkdir(parents=True)
    assert _take(store, tree).files == 0
    (tmp_path / "workspace" / "/".join(["d"] * 100)).mkdir(parents=True)
    with pytest.raises(SandboxTooLarge, match="deeper than 100"):
        _take(store, tree)


@pytest.mark.parametrize(
    "entries",
    [
        [Entry("file", "workspace/../evil", 0o644, content=[b"x"])],
        [Entry("file", "elsewhere/evil", 0o644, content=[b"x"])],
        [Entry("directory", "workspace/a/../../evil", 0o777)],
        [Entry("symlink", "home/up", target=".."), Entry("file", "home/up/evil", content=[b"x"])],
        [Entry("symlink", "home/up", target="up"), Entry("hardlink", "home/e", target="home/up/x")],
        [Entry("hardlink", "workspace/evil", target="workspace/../../etc/passwd")],
    ],
    ids=range(6),
)
def test_entries_that_lead_out_are_not_made(tmp_path: Path, entries: list[Entry]) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises((SandboxRefused, OSError)):
        _tree(tmp_path).fill(iter(entries))
    assert not [path for path in tmp_path.rglob("e*") if path.name != "elsewhere"]


def test_what_vanishes_or_changes_its_kind_meanwhile_is_harmless(tmp_path: Path) -> None:
    """Where nothing can be frozen, a tree runs on while it is read."""
    store, tree, inside = Snapshots(tmp_path / "s"), _tree(tmp_path), tmp_path / "workspace"
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/f").write_text("secret")
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            for name in ("a", "b"):
                (inside / name).mkdir()
                (inside / name / "f").write_text("mine")
            time.sleep(0.0005)
            for name in ("a", "b"):
                (inside / name / "f").unlink()
                (inside / name).rmdir()
                (inside / name).symlink_to(tmp_path / "secret")
            time.sleep(0.0005)
            for name in ("a", "b"):
                (inside / name).unlink()

    changer = threading.Thread(target=change)
    changer.start()
    taken = []
    for _ in range(100):
        try:
            taken.append(_take(store, tree))
        except SandboxRefused as error:
            assert "cannot be read" in str(error)  # A link in place of the directory.
    over.set()
    changer.join()
    assert taken and {info.bytes for info in taken} <= {0, 4, 8}
    assert "secret" not in {path.read_text() for path in (tmp_path / "s").glob("blobs/*/*")}
