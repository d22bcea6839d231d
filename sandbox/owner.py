"""Who owns what in the state directory, so that a service can reap what a killed one left.

    STATE_DIR/<pid>-<start time>/<sandbox id>/...

A service is named by its process id and the kernel's start time of that process, so a reused
id is not mistaken for it. Its directory outlives it only when it was killed. A durable service's
sandboxes outlive it too, and the next durable service takes the directory over as it is.
"""

from __future__ import annotations

import os
import random
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox.api import SandboxInfo
from sandbox.errors import SandboxUnavailable

_DURABLE = "durable"

# The directories that a sandbox may write.
PLACES = ("workspace", "tmp", "home")

# Users for sandboxes under root are drawn from here, far above those of people and packages.
FIRST_UID, LAST_UID = 1 << 30, (1 << 31) - 2
# The one before them is the egress engine's.
ENGINE_UID = FIRST_UID - 1


def default_state_dir() -> Path:
    """A directory of this user in the temporary one; not `$XDG_RUNTIME_DIR`, which is memory."""
    return Path(tempfile.gettempdir()) / f"klong-sandbox-{os.getuid()}"


def start_time(pid: int) -> str | None:
    """The start time of a live process in clock ticks since boot; None when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may hold spaces and brackets; the fields after its last ")" do not.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def this_process() -> str:
    """The owner name of this process."""
    return f"{os.getpid()}-{start_time(os.getpid())}"


def is_alive(owner: str) -> bool:
    """Whether the process that an owner name stands for still runs on this host."""
    pid, _, started = owner.partition("-")
    return pid.isdigit() and start_time(int(pid)) == started


@dataclass(frozen=True)
class Record:
    """What a later service must know of a sandbox to adopt or to reap it.

    Attributes:
        info: The sandbox as its callers see it.
        pid: Process on this host that lives as long as the sandbox; 0 before it is there.
        started: Start time of that process, as `start_time` gives it.
        uid: User that owns its files and processes alone, or None.
    """

    info: SandboxInfo
    pid: int = 0
    started: str = ""
    uid: int | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the sandbox still runs."""
        return self.pid > 0 and start_time(self.pid) == self.started


def claim(state_dir: Path, *, durable: bool = False) -> Path:
    """Makes and returns this service's own directory in `state_dir`.

    One process may run several services, so the name ends in a random part.

    Raises:
        SandboxUnavailable: the state directory belongs to another user, or sandboxes, which do
            not run as root, could not reach it.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    if state_dir.is_symlink() or state_dir.stat().st_uid != os.getuid():
        raise SandboxUnavailable(
            f"state directory {state_dir} is not this user's; choose another --state-dir."
        )
    state_dir.chmod(0o711)
    if os.getuid() == 0:
        for parent in state_dir.resolve().parents:
            if not parent.stat().st_mode & 0o001:
                raise SandboxUnavailable(
                    f"{parent} is closed to other users, whom sandboxes run as; "
                    f"choose another --state-dir than {state_dir}."
                )
    own = state_dir / _own_name()
    own.mkdir()
    own.chmod(0o711)
    if durable:
        (own / _DURABLE).touch()
    return own


def is_durable(own: Path) -> bool:
    """Whether the sandboxes in a service's directory are meant to outlive it."""
    return (own / _DURABLE).exists()


def take_over(dead: Path) -> Path:
    """Makes a dead service's directory this service's, too; what is mounted from it stays so."""
    return dead.rename(dead.with_name(_own_name()))


def _own_name() -> str:
    return f"{this_process()}-{secrets.token_hex(4)}"


def make_box_directory(own: Path, sandbox_id: str) -> Path:
    """Makes the directory of a sandbox.

    In it are `line`, where the agent finds the service's socket and which stays this process's
    own, and `data`, which `make_places` fills.
    """
    box = own / sandbox_id
    for directory in (box, box / "line", box / "data"):
        directory.mkdir()
        directory.chmod(0o711)
    return box


def make_places(box: Path, uid: int | None) -> None:
    """Makes what a sandbox may write, `PLACES` in its `data`, and gives it to user `uid`."""
    for name in PLACES:
        place = box / "data" / name
        place.mkdir()
        place.chmod(0o700)
        if uid is not None:
            os.chown(place, uid, uid)


def draw_uid() -> int | None:
    """A user for one sandbox alone, as root can give it; None for anyone else."""
    return random.SystemRandom().randint(FIRST_UID, LAST_UID) if os.geteuid() == 0 else None


def abandoned(state_dir: Path) -> Iterator[Path]:
    """The directories in `state_dir` whose services are dead."""
    for path in list(state_dir.iterdir()) if state_dir.is_dir() else ():
        owner = path.name.rpartition("-")[0]
        if owner.count("-") == 1 and not is_alive(owner):
            yield path


def box_directories(own: Path) -> Iterator[Path]:
    """The directories of sandboxes in a service's directory."""
    for path in list(own.iterdir()) if own.is_dir() else ():
        if path.name.startswith("sb-"):
            yield path
