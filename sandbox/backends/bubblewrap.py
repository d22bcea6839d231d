"""The bubblewrap command line: what a sandbox sees of the host."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sandbox.backends import seccomp
from sandbox.backends.base import AGENT_DIR, LINE_DIR

# A user without rights, by the same number whatever user the host runs the sandbox as.
_UID = 1000
_FILES = {
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "resolv.conf": "",
}
# The only files of the host's /etc inside: what programs need to start and to check a peer.
_COPIED = ("ld.so.cache", "localtime", "nsswitch.conf", "protocols", "services")
_COPIED_TREES = ("alternatives", "ssl/certs")

ENV = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/home/agent",
    "USER": "agent",
    "LANG": "C.UTF-8",
    "TMPDIR": "/tmp",
}


def users(uid: int) -> dict[str, str]:
    """The files of /etc that name the user of a sandbox."""
    return {
        "passwd": f"root:x:0:0::/:/bin/sh\nagent:x:{uid}:{uid}::{ENV['HOME']}:/bin/sh\n",
        "group": f"root:x:0:\nagent:x:{uid}:\n",
    }


def install(etc: Path, filter_path: Path) -> None:
    """Writes the system-call filter and the `/etc` that every sandbox of a service sees.

    One bind of a made directory is faster than ten.
    """
    filter_path.write_bytes(seccomp.bpf(platform.machine()))
    (etc / "ssl").mkdir(parents=True)
    for name, text in {**users(_UID), **_FILES}.items():
        (etc / name).write_text(text)
    for name in _COPIED:
        if os.path.isfile(f"/etc/{name}"):
            shutil.copyfile(f"/etc/{name}", etc / name)
    for name in _COPIED_TREES:
        if os.path.isdir(f"/etc/{name}"):
            shutil.copytree(f"/etc/{name}", etc / name, symlinks=True)
    for directory, _, names in os.walk(etc):
        os.chmod(directory, 0o755)
        for name in names:
            if not os.path.islink(f"{directory}/{name}"):
                os.chmod(f"{directory}/{name}", 0o644)


def python() -> tuple[str, list[str]]:
    """An interpreter that sandboxes can run, and what must be bound for it."""
    system = "/usr/bin/python3"
    if os.access(system, os.X_OK):
        return system, []
    # The host's Python is this one alone, perhaps in a home directory.
    base = os.path.realpath(sys.base_prefix)
    inside = f"/run/klong/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    return inside, ["--ro-bind", base, "/run/klong/python"]


def arguments(
    etc: Path,
    agent: Path,
    box: Path,
    *,
    filter_fd: int,
    shm_bytes: int,
    network: bool,
    die_with_parent: bool,
) -> list[str]:
    """The `bwrap` call up to the agent: its own namespaces, user, root, /tmp and home.

    The agent is the first process inside; when it ends, the kernel kills all that is left in its
    process namespace.

    Args:
        etc: Directory that `install` made.
        agent: Directory with the agent's code.
        box: The sandbox's directory.
        filter_fd: Descriptor, inherited by `bwrap`, of the file with the system-call filter.
        shm_bytes: Size of the shared memory.
        network: Whether to share the host's network.
        die_with_parent: Whether the kernel ends the sandbox when this process is killed.
    """
    call = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--as-pid-1"]
    call += ["--seccomp", str(filter_fd)]
    if die_with_parent:
        call.append("--die-with-parent")
    call += ["--uid", str(_UID), "--gid", str(_UID), "--hostname", "sandbox"]
    call += [*_programs(), "--ro-bind", str(etc), "/etc"]
    if network:
        call += ["--share-net", "--ro-bind-try", "/etc/resolv.conf", "/etc/resolv.conf"]
    call += ["--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev"]
    # Shared memory counts as the sandbox's where a control group counts; elsewhere nothing does.
    call += ["--size", str(shm_bytes), "--perms", "1777", "--tmpfs", "/dev/shm"]
    call += ["--remount-ro", "/dev"]
    for name, place in (("tmp", "/tmp"), ("home", ENV["HOME"]), ("workspace", "/workspace")):
        call += ["--bind", str(box / "data" / name), place]
    call += ["--ro-bind", str(agent), AGENT_DIR, "--ro-bind", str(box / "line"), LINE_DIR]
    call += python()[1]
    call += ["--remount-ro", "/", "--chdir", "/workspace", "--clearenv"]
    for name, value in ENV.items():
        call += ["--setenv", name, value]
    return [*call, "--"]


def _programs() -> list[str]:
    """Binds what the host's programs are in."""
    binds = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = f"/{name}"
        if os.path.islink(path):
            binds += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            binds += ["--ro-bind", path, path]
    return binds


def problem(drop: Sequence[str]) -> str | None:
    """Why bubblewrap does not work here, or None.

    Args:
        drop: Command prefix that gives up root, as sandboxes use it.
    """
    if shutil.which("bwrap") is None:
        return "the program bwrap is not installed (Debian: apt install bubblewrap)"
    if (lack := seccomp.problem()) is not None:
        return lack
    probe = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns"]
    # Not all of the root: a disk that is unmounted meanwhile, as another sandbox's, would fail it.
    probe += [*_programs(), "--proc", "/proc", "true"]
    done = subprocess.run([*drop, *probe], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"bwrap fails: {done.stderr.strip()}"
