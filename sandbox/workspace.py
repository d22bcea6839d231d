"""The directory tree of one sandbox, read and written from outside while its commands run.

What runs inside may change the tree at any moment and on purpose, so no path is checked first
and used later: every step opens one name relative to an open directory, without following
symbolic links.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from sandbox.errors import SandboxFileMissing, SandboxRefused, SandboxTooLarge

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def split_path(path: str) -> list[str]:
    """The names of a path relative to the workspace; empty for the workspace itself.

    Raises:
        SandboxRefused: the path is absolute, climbs with `..`, or holds a NUL.
    """
    names = [name for name in path.split("/") if name not in ("", ".")]
    if path.startswith("/") or ".." in names or "\0" in path:
        raise SandboxRefused(
            f"path {path!r} must be relative to the workspace, without '..' and NUL."
        )
    return names


class Workspace:
    """File access to a sandbox's workspace that cannot be led out of it."""

    def __init__(self, root: Path, *, owner: int | None, max_bytes: int) -> None:
        """Wraps an existing directory.

        Args:
            root: The directory.
            owner: User and group id given to what is written, or None to keep this process's.
            max_bytes: Largest file that is read or written.
        """
        self.root = root
        self.max_bytes = max_bytes
        self._owner = owner

    @contextlib.contextmanager
    def parent(self, path: str, *, create: bool = False) -> Iterator[tuple[int, str]]:
        """Opens the directory that holds `path`; yields its descriptor and the last name."""
        names = split_path(path)
        if not names:
            raise SandboxRefused(f"path {path!r} names the workspace itself, not a file in it.")
        fd = os.open(self.root, _DIR)
        try:
            for name in names[:-1]:
                if create:
                    self._mkdir(fd, name)
                with _refusals(path):
                    below = os.open(name, _DIR, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd, names[-1]
        except OSError as error:
            # On a disk of its own it is the sandbox that has filled it, not the host that fails.
            if error.errno == errno.ENOSPC and os.path.ismount(self.root.parent):
                raise SandboxTooLarge(
                    f"path {path!r} has no room: the sandbox's disk is full."
                ) from None
            raise
        finally:
            os.close(fd)

    def directory(self, path: str) -> None:
        """Checks that `path` is a directory of the workspace, reached without symbolic links."""
        with self.parent(f"{path}/.probe") if split_path(path) else contextlib.nullcontext():
            pass

    @contextlib.contextmanager
    def opened(self, path: str) -> Iterator[BinaryIO]:
        """Opens one regular file for reading; its size is not looked at."""
        with self.parent(path) as (parent, name), _refusals(path):
            fd = os.open(name, _FILE, dir_fd=parent)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise SandboxRefused(f"path {path!r} is not a regular file.")
            with open(fd, "rb", closefd=False) as file:
                yield file
        finally:
            os.close(fd)

    def read(self, path: str) -> bytes:
        """The bytes of one regular file."""
        with self.opened(path) as file:
            # One byte more than allowed: the file may grow after any check of its size.
            data = file.read(self.max_bytes + 1)
        if len(data) > self.max_bytes:
            raise SandboxTooLarge(f"path {path!r} is over the limit of {self.max_bytes} bytes.")
        return data

    def write(self, path: str, source: BinaryIO, *, mode: int | None = None) -> None:
        """Replaces one regular file atomically with what `source` holds.

        Missing directories are made. Without `mode` the permission bits of a replaced file stay.
        """
        with self.parent(path, create=True) as (parent, name):
            if mode is None:
                mode = self._replaced_mode(parent, name, path)
            temporary = f".{secrets.token_hex(8)}.part"
            fd = os.open(temporary, _NEW, 0o600, dir_fd=parent)
            try:
                with open(fd, "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                    if self._owner is not None:
                        os.fchown(fd, self._owner, self._owner)
                    os.fchmod(fd, mode)
                with _refusals(path):
                    os.replace(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=parent)
                raise

    def make_directory(self, path: str, mode: int) -> None:
        """Makes a directory, or sets the permission bits of an existing one."""
        with self.parent(path, create=True) as (parent, name):
            self._mkdir(parent, name)
            with _refusals(path):
                fd = os.open(name, _DIR, dir_fd=parent)
            try:
                os.fchmod(fd, mode)
            finally:
                os.close(fd)

    def make_symlink(self, path: str, target: str) -> None:
        """Makes a symbolic link in place of any file; nothing here ever follows it."""
        with self.parent(path, create=True) as (parent, name), _refusals(path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=parent)
            os.symlink(target, name, dir_fd=parent)
            if self._owner is not None:
                os.chown(name, self._owner, self._owner, dir_fd=parent, follow_symlinks=False)

    def _mkdir(self, parent: int, name: str) -> None:
        try:
            os.mkdir(name, 0o755, dir_fd=parent)
        except FileExistsError:
            return
        if self._owner is not None:
            os.chown(name, self._owner, self._owner, dir_fd=parent, follow_symlinks=False)

    def _replaced_mode(self, parent: int, name: str, path: str) -> int:
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return 0o644
        if not stat.S_ISREG(status.st_mode):
            raise SandboxRefused(f"path {path!r} exists and is not a regular file.")
        return stat.S_IMODE(status.st_mode) & 0o777


@contextlib.contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Says in one sentence why the workspace would not give or take `path`."""
    try:
        yield
    except FileNotFoundError:
        raise SandboxFileMissing(f"path {path!r} does not exist in the workspace.") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise SandboxRefused(
            f"path {path!r} is not a regular file reached through plain directories "
            f"({error.strerror}); symbolic links are not followed."
        ) from None


def remove_tree(root: Path) -> None:
    """Removes a directory tree, however deep, also one whose own permission bits forbid it.

    Directories move to the top before they are emptied: no path grows long, and no link is
    followed.
    """
    with suppress(FileNotFoundError):
        top = _unlocked(os.fspath(root), None)
        try:
            while names := os.listdir(top):
                for name in names:
                    with suppress(FileNotFoundError):
                        if _is_directory(name, top):
                            _flatten(name, top)
                        else:
                            os.unlink(name, dir_fd=top)
        finally:
            os.close(top)
        os.rmdir(root)


def _flatten(name: str, top: int) -> None:
    """Removes a directory of `top`, and moves those in it there."""
    directory = _unlocked(name, top)
    try:
        for each in os.listdir(directory):
            if _is_directory(each, directory):
                # One that may not be written to may not be moved.
                os.close(_unlocked(each, directory))
                moved = f".{secrets.token_hex(8)}"
                os.rename(each, moved, src_dir_fd=directory, dst_dir_fd=top)
            else:
                os.unlink(each, dir_fd=directory)
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=top)


def _is_directory(name: str, parent: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def _unlocked(name: str, parent: int | None) -> int:
    """Opens a directory, whatever its permission bits were."""
    place = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{place}", 0o700)
        return os.open(".", _DIR, dir_fd=place)
    finally:
        os.close(place)
