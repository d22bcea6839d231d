"""A workspace as an uncompressed tar whose SHA-256 is a content hash of the tree."""

from __future__ import annotations

import os
import stat
import tarfile
from typing import BinaryIO

from sandbox.errors import SandboxRefused, SandboxTooLarge
from sandbox.workspace import Workspace, split_path

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_MAX_DEPTH = 100
# What the headers of a small tree may take over its limit.
_SLACK = 1 << 20


def pack(workspace: Workspace, out: BinaryIO) -> None:
    """Writes the tree to `out`: names sorted, times and owners zero, permission bits kept.

    Directories, regular files and symbolic links (as links) are packed; sockets, pipes and
    devices are not.

    Raises:
        SandboxTooLarge: the tree holds more than `workspace.max_bytes`.
        SandboxRefused: something in it cannot be read, or shrinks while it is read.
    """
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        root = os.open(workspace.root, _OPEN | os.O_DIRECTORY)
        try:
            _pack_directory(tar, root, "", 0, workspace.max_bytes)
        finally:
            os.close(root)


def _pack_directory(
    tar: tarfile.TarFile, directory: int, prefix: str, depth: int, max_bytes: int
) -> None:
    if depth > _MAX_DEPTH:
        raise SandboxTooLarge(f"path {prefix[:100]!r}... is over {_MAX_DEPTH} directories deep.")
    for name in sorted(os.listdir(directory)):
        try:
            _pack_entry(tar, directory, prefix, name, depth, max_bytes)
        except FileNotFoundError:
            continue  # Removed since it was listed.
        except OSError as error:
            raise SandboxRefused(
                f"path {prefix + name!r} cannot be packed: {error.strerror or error}."
            ) from None


def _pack_entry(
    tar: tarfile.TarFile, directory: int, prefix: str, name: str, depth: int, max_bytes: int
) -> None:
    # Directories and links have no bytes of their own, but take room in the tar.
    if tar.offset > 2 * max_bytes + _SLACK:
        raise SandboxTooLarge(f"the workspace is over the limit of {max_bytes} bytes.")
    member = tarfile.TarInfo(prefix + name)
    mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        member.type, member.mode = tarfile.SYMTYPE, 0o777
        member.linkname = os.readlink(name, dir_fd=directory)
        tar.addfile(member)
    elif stat.S_ISDIR(mode):
        fd = os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=directory)
        try:
            member.type, member.mode = tarfile.DIRTYPE, stat.S_IMODE(mode) & 0o777
            tar.addfile(member)
            _pack_directory(tar, fd, f"{prefix}{name}/", depth + 1, max_bytes)
        finally:
            os.close(fd)
    elif stat.S_ISREG(mode):
        with open(os.open(name, _OPEN, dir_fd=directory), "rb") as file:
            # The size of what was opened, which need not be what was looked at above.
            member.size = os.fstat(file.fileno()).st_size
            member.mode = stat.S_IMODE(mode) & 0o777
            if tar.offset + member.size > max_bytes:
                raise SandboxTooLarge(f"the workspace is over the limit of {max_bytes} bytes.")
            tar.addfile(member, file)


def unpack(workspace: Workspace, source: BinaryIO) -> None:
    """Writes the members of an uncompressed tar over the workspace; other files stay.

    The standard library's extraction filters look at the tree before they write, which commands
    running inside can race. Here each member goes through `Workspace`, which follows no link at
    all; so links may point anywhere (a virtual environment's do), hard links become copies.

    Raises:
        SandboxRefused: not a tar, a member that would leave the workspace, or a special file.
        SandboxTooLarge: the members are over `workspace.max_bytes` together.
    """
    try:
        with tarfile.open(fileobj=source, mode="r:") as tar:
            left = workspace.max_bytes
            for member in tar:
                if split_path(member.name):
                    left = _unpack_member(workspace, tar, member, left)
    except tarfile.TarError as error:
        raise SandboxRefused(f"the archive is not a readable uncompressed tar: {error}.") from None


def _unpack_member(
    workspace: Workspace, tar: tarfile.TarFile, member: tarfile.TarInfo, left: int
) -> int:
    """Writes one member; returns how many of the `left` bytes remain."""
    if member.isdir():
        workspace.make_directory(member.name, member.mode & 0o777 | 0o700)
    elif member.issym():
        workspace.make_symlink(member.name, member.linkname)
    elif member.isreg() or member.islnk():
        try:
            source = tar.extractfile(member)
        except KeyError:
            source = None
        if source is None:
            raise SandboxRefused(f"member {member.name!r} links to nothing in the archive.")
        with source:
            size = source.seek(0, os.SEEK_END)
            if size > left:
                raise SandboxTooLarge(
                    f"the archive unpacks to more than the limit of {workspace.max_bytes} bytes."
                )
            source.seek(0)
            workspace.write(member.name, source, mode=member.mode & 0o777)  # type: ignore[arg-type]
        return left - size
    else:
        raise SandboxRefused(
            f"member {member.name!r} is neither a regular file, a directory nor a symbolic link."
        )
    return left
