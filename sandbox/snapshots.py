"""Snapshots of sandboxes in a directory, by what is in them.

    snapshots/blobs/ab/cdef...      the bytes of a file, named by their SHA-256
    snapshots/manifests/DIGEST      a line an entry or session; named by its SHA-256
    snapshots/notes/DIGEST          when it was taken, of what: no part of the digest
    snapshots/new/                  what is being written

A snapshot exists once its manifest does, which comes last. Who writes or reads one holds a lock
that others share; who collects what no manifest names holds it alone. The kernel frees the lock
of a process that is killed, and what it left in `new` is collected next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sandbox.api import SnapshotInfo, SnapshotSession, parse, to_json
from sandbox.errors import (
    SandboxRefused,
    SandboxSnapshotDamaged,
    SandboxSnapshotMissing,
    SandboxUnavailable,
)
from sandbox.look import Look, Shell
from sandbox.tree import CHUNK, Entry, write_sparse

_DIGEST = re.compile(r"[0-9a-f]{64}")

_FORMAT = "klong-snapshot 1"

_PLACES = ("blobs", "manifests", "notes", "new")

# How long a deletion waits for others to be done, before it leaves its blobs to the next.
_PATIENCE_S, _RETRY_S = 5.0, 0.05


class Stopped(Exception):
    """A snapshot was given up."""


@dataclass
class _Count:
    files: int = 0
    bytes: int = 0
    skipped: int = 0


@dataclass
class _Manifest:
    """A manifest that is being written."""

    file: BinaryIO
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, line: Any) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        self.digest.update(data)
        self.file.write(data)


class Snapshots:
    """The snapshots of a state directory; its methods block, and may run in any thread."""

    def __init__(self, root: Path) -> None:
        """Makes the directory if there is none, for this user alone."""
        self._root = root
        root.mkdir(mode=0o700, exist_ok=True)
        for name in _PLACES:
            (root / name).mkdir(mode=0o700, exist_ok=True)

    def take(
        self,
        entries: Iterable[Entry],
        look: Look,
        *,
        sandbox: str,
        frozen: bool,
        is_stopped: Callable[[], bool],
    ) -> SnapshotInfo:
        """Keeps the entries of a tree and the sessions above it.

        Args:
            entries: As a `Tree` gives them.
            look: What runs in the sandbox.
            sandbox: Its id.
            frozen: Whether it stands still meanwhile.
            is_stopped: Whether it was given up, or what is read is being removed.

        Raises:
            SandboxUnavailable: the disk is full.
            Stopped: it was.
        """
        count = _Count()
        with self._shared(), self._new() as (path, file), _room(self._root):
            manifest = _Manifest(file)
            manifest.add([_FORMAT])
            for entry in entries:
                if is_stopped():
                    raise Stopped
                self._add(manifest, entry, count)
            for shell in look.shells:
                manifest.add(["shell", to_json(shell)])
            file.flush()
            digest = manifest.digest.hexdigest()
            info = SnapshotInfo(
                digest=digest,
                sandbox=sandbox,
                created_at=time.time(),
                files=count.files,
                bytes=count.bytes,
                skipped=count.skipped,
                frozen=frozen,
                lost_processes=look.processes,
                sessions=tuple(
                    SnapshotSession(s.name, _legible(s.cwd), s.whole) for s in look.shells
                ),
            )
            with self._new() as (note, note_file):
                note_file.write(json.dumps(to_json(info)).encode())
                note_file.flush()
                os.replace(note, self._root / "notes" / digest)
            if is_stopped():
                raise Stopped
            os.replace(path, self._root / "manifests" / digest)
        return info

    def _add(self, manifest: _Manifest, entry: Entry, count: _Count) -> None:
        if entry.kind == "special":
            count.skipped += 1
            return
        line: list[Any] = [entry.kind, entry.path]
        if entry.kind in ("directory", "file"):
            line.append(entry.mode)
        if entry.kind != "hardlink":
            line.append(entry.mtime_ns)
        if entry.kind == "file":
            digest, size = self._keep(entry.content)
            count.files += 1
            count.bytes += size
            line += [digest, size]
        elif entry.target:
            line.append(entry.target)
        manifest.add(line)

    def _keep(self, content: Iterable[bytes]) -> tuple[str, int]:
        """Stores bytes, unless they are there; returns their digest and size."""
        chunks = iter(content)
        head = bytearray()
        for chunk in chunks:
            head += chunk
            if len(head) >= CHUNK:
                return self._keep_large(bytes(head), chunks)
        digest = hashlib.sha256(head).hexdigest()
        blob = self._blob(digest)
        if not _is_there(blob, len(head)):
            with self._new() as (path, file):
                file.write(head)
                file.flush()
                self._place(path, blob)
        return digest, len(head)

    def _keep_large(self, head: bytes, chunks: Iterator[bytes]) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0

        def heard() -> Iterator[bytes]:
            nonlocal size
            for chunk in itertools.chain((head,), chunks):
                digest.update(chunk)
                size += len(chunk)
                yield chunk

        with self._new() as (path, file):
            write_sparse(file.fileno(), heard())
            blob = self._blob(digest.hexdigest())
            if not _is_there(blob, size):
                self._place(path, blob)
        return digest.hexdigest(), size

    def _place(self, path: Path, blob: Path) -> None:
        blob.parent.mkdir(mode=0o700, exist_ok=True)
        os.replace(path, blob)

    def list(self) -> Sequence[SnapshotInfo]:
        """Every snapshot, the latest last."""
        found = []
        for name in os.listdir(self._root / "manifests"):
            with contextlib.suppress(SandboxSnapshotMissing):
                found.append(self.info(name))
        return sorted(found, key=lambda info: info.created_at)

    def info(self, digest: str) -> SnapshotInfo:
        """One snapshot.

        Raises:
            SandboxSnapshotMissing: there is none of that digest.
            SandboxSnapshotDamaged: its note cannot be read.
        """
        if not self._manifest(digest).is_file():
            raise _missing(digest)
        try:
            return parse(SnapshotInfo, (self._root / "notes" / digest).read_bytes())
        except FileNotFoundError:
            raise _missing(digest) from None
        except SandboxRefused as error:
            raise SandboxSnapshotDamaged(
                f"snapshot {digest} is damaged: its note says {error} Delete it."
            ) from None

    def restore(self, digest: str, fill: Callable[[Iterator[Entry]], None]) -> Sequence[Shell]:
        """Gives `fill` the entries of a snapshot; returns the sessions to open after that.

        Raises:
            SandboxSnapshotMissing: there is none of that digest.
            SandboxSnapshotDamaged: something of it is missing, or is not what it was.
        """
        shells: list[Shell] = []

        def entries() -> Iterator[Entry]:
            for kind, *fields in self._lines(digest):
                if kind == "shell":
                    shells.append(Shell(**fields[0]))
                else:
                    yield self._entry(digest, kind, fields)

        with self._shared():
            fill(entries())
        return shells

    def _lines(self, digest: str) -> Iterator[Any]:
        """The lines of a manifest, once all of it is known to be what it was."""
        try:
            file = open(self._manifest(digest), "rb")  # noqa: SIM115
        except FileNotFoundError:
            raise _missing(digest) from None
        with file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise _damaged(digest, "its manifest has other bytes than were written")
            file.seek(0)
            if json.loads(next(file)) != [_FORMAT]:
                raise _damaged(digest, "another version of the service has written it")
            yield from map(json.loads, file)

    def _entry(self, digest: str, kind: str, fields: Sequence[Any]) -> Entry:
        if kind == "file":
            path, mode, mtime_ns, blob, size = fields
            content = self._content(digest, path, blob, size)
            return Entry("file", path, mode, mtime_ns, content=content)
        if kind == "directory":
            return Entry("directory", *fields)
        if kind == "symlink":
            return Entry("symlink", fields[0], mtime_ns=fields[1], target=fields[2])
        return Entry("hardlink", fields[0], target=fields[1])

    def _content(self, digest: str, path: str, blob: str, size: int) -> Iterator[bytes]:
        found = hashlib.sha256()
        try:
            with open(self._blob(blob), "rb", buffering=0) as file:
                while chunk := file.read(CHUNK):
                    found.update(chunk)
                    yield chunk
        except FileNotFoundError:
            raise _damaged(digest, f"the bytes of {path!r} are missing") from None
        if found.hexdigest() != blob:
            raise _damaged(digest, f"{path!r} has other bytes than were written ({size})")

    def delete(self, digest: str) -> None:
        """Deletes a snapshot and the blobs that no other has.

        Raises:
            SandboxSnapshotMissing: there is none of that digest.
        """
        try:
            self._manifest(digest).unlink()
        except FileNotFoundError:
            raise _missing(digest) from None
        (self._root / "notes" / digest).unlink(missing_ok=True)
        if not self.collect():
            # For the next deletion, or the next service.
            (self._root / "new" / "uncollected").touch()

    def recover(self) -> None:
        """Collects what a process that was killed has left, unless another is at work."""
        if os.listdir(self._root / "new"):
            self.collect(patience_s=0.0)

    def collect(self, *, patience_s: float = _PATIENCE_S) -> bool:
        """Removes what no snapshot names; whether others left it the time to."""
        with self._lock(fcntl.LOCK_EX, patience_s) as alone:
            if not alone:
                return False
            for path in (self._root / "new").iterdir():
                path.unlink()
            named: set[str] = set()
            for path in (self._root / "manifests").iterdir():
                named.update(_blobs(path))
            for path in (self._root / "blobs").glob("*/*"):
                if path.parent.name + path.name not in named:
                    path.unlink()
        return True

    def _manifest(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise SandboxRefused(
                f"digest {digest!r}: is of 64 hexadecimal digits, in small letters."
            )
        return self._root / "manifests" / digest

    def _blob(self, digest: str) -> Path:
        return self._root / "blobs" / digest[:2] / digest[2:]

    @contextlib.contextmanager
    def _new(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A file that is removed unless it is moved to its place."""
        path = self._root / "new" / secrets.token_hex(16)
        try:
            with open(path, "xb") as file:
                path.chmod(0o600)
                yield path, file
        finally:
            path.unlink(missing_ok=True)

    def _shared(self) -> contextlib.AbstractContextManager[bool]:
        return self._lock(fcntl.LOCK_SH, None)

    @contextlib.contextmanager
    def _lock(self, kind: int, patience_s: float | None) -> Iterator[bool]:
        """Holds the lock, or after some seconds does not."""
        with open(self._root / "lock", "ab") as file:
            deadline = None if patience_s is None else time.monotonic() + patience_s
            while True:
                try:
                    fcntl.flock(file, kind if deadline is None else kind | fcntl.LOCK_NB)
                except BlockingIOError:
                    assert deadline is not None
                    if time.monotonic() > deadline:
                        yield False
                        return
                    time.sleep(_RETRY_S)
                else:
                    break
            yield True


def _legible(path: str | None) -> str | None:
    """A path as text that every reader of JSON takes."""
    return None if path is None else os.fsencode(path).decode("utf-8", "replace")


def _is_there(blob: Path, size: int) -> bool:
    # After a loss of power a file may have its name and not its bytes.
    with contextlib.suppress(FileNotFoundError):
        return blob.stat().st_size == size
    return False


def _blobs(manifest: Path) -> Iterator[str]:
    """The blobs that a manifest names; one that is damaged names what it can."""
    with open(manifest, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, LookupError, TypeError):
                kind, *fields = json.loads(line)
                if kind == "file":
                    yield fields[3]


def _missing(digest: str) -> SandboxSnapshotMissing:
    return SandboxSnapshotMissing(f"there is no snapshot {digest}; list those there are.")


def _damaged(digest: str, how: str) -> SandboxSnapshotDamaged:
    return SandboxSnapshotDamaged(f"snapshot {digest} is damaged: {how}; delete it.")


@contextlib.contextmanager
def _room(root: Path) -> Iterator[None]:
    """Says in a sentence that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SandboxUnavailable(
            f"the disk of {root} is full: delete snapshots, or free it otherwise."
        ) from None
