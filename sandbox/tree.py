"""The files of a sandbox as a stream of entries: what a snapshot keeps and a restore brings back.

A backend with the files on this host has a `HostTree`; any other may make the same stream, of a
tar, say.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from sandbox.errors import SandboxRefused, SandboxTooLarge

Kind = Literal["directory", "file", "symlink", "hardlink", "special"]

CHUNK = 1 << 20

# A descriptor is open for each directory above a file; deeper trees would use up the service's.
_MAX_DEPTH = 100

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Entry:
    """A file of a tree.

    Attributes:
        kind: What it is; a `hardlink` is another name of the file that `target` is the path of,
            and a `special` file, such as a pipe, is told of but not kept.
        path: Its path, with the place that it is in as the first name: `workspace/a/b`.
        mode: Permission bits.
        mtime_ns: Time of its last change.
        target: Of a link: where it points.
        content: Of a file: its bytes, to be read before the next entry.
    """

    kind: Kind
    path: str
    mode: int = 0
    mtime_ns: int = 0
    target: str = ""
    content: Iterable[bytes] = ()


class Tree(Protocol):
    """The places of a sandbox that a snapshot keeps: `workspace` and `home`."""

    def read(self) -> Iterator[Entry]:
        """Its entries: a directory before what is in it, names sorted; from any thread.

        Raises:
            SandboxTooLarge: it holds more than the sandbox may.
            SandboxRefused: something in it cannot be read.
        """

    def fill(self, entries: Iterable[Entry]) -> None:
        """Makes entries in places that are empty.

        Raises:
            SandboxTooLarge: they have no room.
        """


@dataclass
class _Left:
    """What may still be read, and the paths of files with several names."""

    bytes: int
    entries: int
    seen: dict[tuple[int, int], str] = field(default_factory=dict)


class HostTree:
    """Directories of this host, read and filled without following a link."""

    def __init__(
        self, places: Mapping[str, Path], *, owner: int | None, max_bytes: int, max_entries: int
    ) -> None:
        """Wraps existing directories.

        Args:
            places: Them, by the names that entries have them by.
            owner: User and group id given to what is made, or None to keep this process's.
            max_bytes: Bytes that all files may hold.
            max_entries: How many entries there may be.
        """
        self._places, self._owner = places, owner
        self._max_bytes, self._max_entries = max_bytes, max_entries

    def read(self) -> Iterator[Entry]:
        """As in `Tree`; what vanishes while it is read is left out."""
        left = _Left(self._max_bytes, self._max_entries)
        for name, root in sorted(self._places.items()):
            fd = os.open(root, _DIR)
            try:
                yield self._directory(fd, name)
                yield from self._below(fd, f"{name}/", left, depth=1)
            finally:
                os.close(fd)

    def _below(self, directory: int, prefix: str, left: _Left, *, depth: int) -> Iterator[Entry]:
        for name in self._names(directory, left):
            try:
                yield from self._entry(directory, prefix, name, left, depth)
            except FileNotFoundError:
                continue  # Removed since it was listed.
            except OSError as error:
                raise SandboxRefused(
                    f"path {prefix + name!r} cannot be read: {error.strerror or error}."
                ) from None

    def _names(self, directory: int, left: _Left) -> list[str]:
        names: list[str] = []
        with os.scandir(directory) as found:
            for entry in found:
                left.entries -= 1
                if left.entries < 0:
                    raise SandboxTooLarge(f"the sandbox has more than {self._max_entries} files.")
                names.append(entry.name)
        return sorted(names)

    def _entry(
        self, directory: int, prefix: str, name: str, left: _Left, depth: int
    ) -> Iterator[Entry]:
        path = prefix + name
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            target = os.readlink(name, dir_fd=directory)
            yield Entry("symlink", path, mtime_ns=found.st_mtime_ns, target=target)
        elif stat.S_ISDIR(found.st_mode):
            if depth >= _MAX_DEPTH:
                raise SandboxTooLarge(f"path {path!r} is deeper than {_MAX_DEPTH} directories.")
            fd = os.open(name, _DIR, dir_fd=directory)
            try:
                yield self._directory(fd, path)
                yield from self._below(fd, f"{path}/", left, depth=depth + 1)
            finally:
                os.close(fd)
        elif stat.S_ISREG(found.st_mode):
            fd = os.open(name, _READ, dir_fd=directory)
            try:
                yield self._file(fd, path, left)
            finally:
                os.close(fd)
        else:
            yield Entry("special", path)

    def _directory(self, fd: int, path: str) -> Entry:
        found = os.fstat(fd)
        return Entry("directory", path, found.st_mode & 0o777, found.st_mtime_ns)

    def _file(self, fd: int, path: str, left: _Left) -> Entry:
        # What was opened, which need not be what was looked at before.
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return Entry("special", path)
        if found.st_nlink > 1:
            first = left.seen.setdefault((found.st_dev, found.st_ino), path)
            if first != path:
                return Entry("hardlink", path, target=first)
        return Entry(
            "file",
            path,
            found.st_mode & 0o777,
            found.st_mtime_ns,
            content=self._content(fd, left),
        )

    def _content(self, fd: int, left: _Left) -> Iterator[bytes]:
        # Counted as it is read: a file may grow after any look at its size.
        while chunk := os.read(fd, CHUNK):
            left.bytes -= len(chunk)
            if left.bytes < 0:
                raise SandboxTooLarge(
                    f"the files of the sandbox are over its limit of {self._max_bytes} bytes."
                )
            yield chunk

    def fill(self, entries: Iterable[Entry]) -> None:
        """As in `Tree`."""
        with closing(_Filling(self._places, self._owner)) as filling:
            try:
                for entry in entries:
                    filling.add(entry)
                filling.finish()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise SandboxTooLarge(
                    "the snapshot has no room in the sandbox: raise its limits.disk_mb and "
                    "limits.inodes, or free the disk of the service's host."
                ) from None


class _Filling:
    """Makes entries; keeps the directory open that it was in last."""

    def __init__(self, places: Mapping[str, Path], owner: int | None) -> None:
        self._places, self._owner = places, owner
        # Their modes and times come last: a read-only directory could not be filled.
        self._directories: list[Entry] = []
        self._at, self._fd = "", -1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def add(self, entry: Entry) -> None:
        above, _, name = entry.path.rpartition("/")
        if entry.kind == "directory":
            self._directories.append(entry)
            if not above:
                return  # A place, which is there.
        parent = self._enter(above)
        if entry.kind == "directory":
            os.mkdir(name, 0o700, dir_fd=parent)
        elif entry.kind == "symlink":
            os.symlink(entry.target, name, dir_fd=parent)
            times = (entry.mtime_ns, entry.mtime_ns)
            os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)
        elif entry.kind == "hardlink":
            source_above, _, source = entry.target.rpartition("/")
            with closing(_Filling(self._places, self._owner)) as other:
                directory = other._enter(source_above)
                os.link(
                    source, name, src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False
                )
            return
        elif entry.kind == "file":
            self._file(parent, name, entry)
            return
        if self._owner is not None:
            os.chown(name, self._owner, self._owner, dir_fd=parent, follow_symlinks=False)

    def finish(self) -> None:
        for entry in reversed(self._directories):
            fd = self._enter(entry.path)
            os.fchmod(fd, entry.mode)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def _enter(self, path: str) -> int:
        if path != self._at or self._fd < 0:
            self.close()
            place, *names = path.split("/")
            if place not in self._places or {"", ".", ".."} & set(names):
                raise SandboxRefused(f"path {path!r} of the snapshot leads out of the sandbox.")
            self._fd = os.open(self._places[place], _DIR)
            for name in names:
                below = os.open(name, _DIR, dir_fd=self._fd)
                os.close(self._fd)
                self._fd = below
            self._at = path
        return self._fd

    def _file(self, parent: int, name: str, entry: Entry) -> None:
        fd = os.open(name, _NEW, 0o600, dir_fd=parent)
        try:
            write_sparse(fd, entry.content)
            if self._owner is not None:
                os.fchown(fd, self._owner, self._owner)
            os.fchmod(fd, entry.mode)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)


def write_sparse(fd: int, content: Iterable[bytes]) -> None:
    """Writes to an empty file; leaves holes where there are zeros only, as sparse files have."""
    size = 0
    for chunk in content:
        end = size + len(chunk)
        if chunk.count(0) < len(chunk):
            while size < end:
                size += os.pwrite(fd, memoryview(chunk)[size - end :], size)
        size = end
    os.ftruncate(fd, size)
