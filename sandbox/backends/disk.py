"""A disk of its own for a sandbox: a file with an ext4 in it, which ends where its quota does."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import secrets
import shutil
from pathlib import Path

from sandbox.errors import SandboxError, SandboxRefused
from sandbox.spec import MB, Limits

# Of <sys/mount.h>: gone from the tree at once, ended with its last user.
_MNT_DETACH = 2

# Of each inode in the file system's tables.
_INODE_BYTES = 256
_BYTES_PER_INODE = 16_384


def problem() -> str | None:
    """Why this host cannot hold a quota, or None."""
    if os.geteuid() != 0:
        return "the service does not run as root, who alone may mount"
    if shutil.which("mkfs.ext4") is None:
        return "the program mkfs.ext4 is not installed (Debian: apt install e2fsprogs)"
    if not os.path.exists("/dev/loop-control"):
        return "this host has no loop devices"
    return None


def held() -> str:
    """How quotas are held, for the service's health answer."""
    lack = problem()
    return "ext4 in a file" if lack is None else f"not limited: {lack}"


async def mount(box: Path, limits: Limits) -> None:
    """Gives a sandbox's `data` a file system of its own, if its limits ask for a quota.

    The file takes of the host what the sandbox has written, not the whole quota.

    Raises:
        SandboxRefused: this host cannot hold a quota.
    """
    if limits.disk_mb is None:
        if limits.inodes is not None:
            raise SandboxRefused("limits.inodes: needs limits.disk_mb; set that, too.")
        return
    if (lack := problem()) is not None:
        raise SandboxRefused(f"limits.disk_mb: {lack}; leave it out, or serve where it can be had.")
    image, size = box / "disk", limits.disk_mb * MB
    inodes = limits.inodes or max(64, size // _BYTES_PER_INODE)
    template = box.parent / f"disk-{size}-{inodes}"
    if not template.exists():
        await _make(template, size + inodes * _INODE_BYTES, inodes)
    _copy(template, image)
    await _run("mount", "-o", "loop,nosuid,nodev,noatime", str(image), str(box / "data"))
    (box / "data").chmod(0o711)
    (box / "data/lost+found").rmdir()


async def _make(template: Path, size: int, inodes: int) -> None:
    """Makes a file with an empty file system, which those of all equal sandboxes are copies of."""
    new = template.with_name(f"{template.name}.{secrets.token_hex(4)}")
    try:
        with open(new, "xb") as file:
            file.truncate(size)
        # What a crash of the host would cost is a sandbox, which it costs anyway: no journal.
        make = "-q -F -b 4096 -m 0 -O ^has_journal,^resize_inode -E nodiscard,lazy_itable_init=1"
        await _run("mkfs.ext4", *make.split(), "-N", str(inodes), str(new))
        new.rename(template)
    finally:
        new.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """Copies a sparse file, holes as holes."""
    with open(source, "rb") as old, open(target, "xb") as new:
        os.fchmod(new.fileno(), 0o600)
        size, end = os.fstat(old.fileno()).st_size, 0
        new.truncate(size)
        while end < size:
            try:
                start = os.lseek(old.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return  # The rest is a hole.
            end = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            old.seek(start)
            new.seek(start)
            new.write(old.read(end - start))


async def unmount(box: Path) -> None:
    """Takes the file system away; its device goes with its last user."""
    if not os.path.ismount(box / "data"):
        return
    # Not by a program: this must be possible on a host where no process can be started.
    if ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(box / "data"), _MNT_DETACH):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(box / "data"))


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    if process.returncode:
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise SandboxError(
            f"the sandbox's disk cannot be made: {command[0]} says {last!r}; look whether the host "
            "has room on its disk and loop devices, or serve with --disk-mb 0."
        )
