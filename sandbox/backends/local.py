"""Sandboxes of this host: one bubblewrap each, or plain processes where there is none."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from sandbox import owner
from sandbox.api import SandboxInfo
from sandbox.backends import bubblewrap, cgroups, disk
from sandbox.backends.base import (
    AGENT_DIR,
    LINE_DIR,
    agent_arguments,
    await_agent,
    clear,
    install_agent,
    open_link,
    open_tree,
    open_workspace,
    shm_bytes,
)
from sandbox.backends.box import Box, Freezer
from sandbox.backends.inheritance import inherit
from sandbox.backends.processes import Members, kill_all
from sandbox.backends.removals import Removals
from sandbox.errors import SandboxRefused, SandboxUnavailable
from sandbox.spec import MB, Isolation, Limits
from sandbox.store import Store
from sandbox.workspace import remove_tree

log = logging.getLogger("sandbox")

# The variable that marks the processes of a sandbox.
_MARKER = "KLONG_SANDBOX"

# Seconds for an agent to come up, and to dial a service that adopts it.
_START_S, _ADOPT_S = 30.0, 5.0

# Joins control groups, sets limits, then becomes the agent; $1 counts the groups. Nothing inside
# may go back to a score under which the kernel, out of memory, spares the service.
_SETUP = """n=$1; shift
while [ "$n" -gt 0 ]; do echo 0 >"$1" || exit 125; shift; n=$((n-1)); done
echo 0 2>/dev/null >/proc/self/oom_score_adj
ulimit -c 0; ulimit -f "$1"; ulimit -n "$2"; shift 2; exec "$@"
"""

# Before every command where no control group holds the limit; dash says -p for what bash says -u.
_PROCESSES = 'if [ "$BASH_VERSION" ]; then ulimit -u {0}; else ulimit -p {0}; fi; '


class LocalBackend:
    """Runs sandboxes on this host."""

    name = "local"

    def __init__(
        self,
        *,
        isolation: Literal["auto", "bubblewrap", "none"] = "auto",
        state_dir: Path | None = None,
        durable: bool = False,
    ) -> None:
        """Describes the backend; `start` checks it.

        Args:
            isolation: "auto" takes bubblewrap where it works.
            state_dir: Where workspaces live; None is a directory in the temporary one.
            durable: Whether sandboxes outlive a service that is killed, for the next to adopt.
        """
        self.isolation: Isolation = "none" if isolation == "none" else "bubblewrap"
        self._may_fall_back = isolation == "auto"
        self._state_dir = (state_dir or owner.default_state_dir()) / "local"
        self._root = os.geteuid() == 0
        self._durable = durable
        self._taken_over: list[Path] = []
        self.reaped = 0
        self._removals = Removals()
        self.cgroups: cgroups.Cgroups | None = None

    async def start(self) -> list[Box]:
        """Chooses isolation and limits, and reaps or adopts what dead services left."""
        if self.isolation == "bubblewrap":
            problem = bubblewrap_problem()
            if problem and not self._may_fall_back:
                raise SandboxUnavailable(
                    f"bubblewrap isolation cannot be had: {problem}; only isolation none, "
                    "which isolates nothing, needs no bubblewrap."
                )
            if problem:
                self.isolation = "none"
        if self.isolation == "none":
            log.warning("sandboxes are not isolated (isolation: none): run only trusted commands")
        self.cgroups = cgroups.detect()
        self.own = owner.claim(self._state_dir, durable=self._durable)
        self.store = Store(self._state_dir / "store.db")
        inherited = await inherit(
            self._state_dir,
            self.store,
            durable=self._durable,
            adopt=lambda directory, record: self._attach(record, directory, _ADOPT_S),
            reap=self._discard,
        )
        self._taken_over, self.reaped = inherited.directories, inherited.reaped
        self.etc, self.agent, self.filter = (self.own / name for name in ("etc", "agent", "filter"))
        if self.isolation == "bubblewrap":
            await asyncio.to_thread(bubblewrap.install, self.etc, self.filter)
        await asyncio.to_thread(install_agent, self.agent)
        return inherited.boxes

    async def create(self, info: SandboxInfo) -> Box:
        """Makes the directories and the control group of a sandbox, and starts its agent."""
        if info.spec.image is not None:
            raise SandboxRefused(
                "image: the local backend has no images; leave it out or use --backend docker."
            )
        uid = owner.draw_uid()
        directory = owner.make_box_directory(self.own, info.id)
        record = owner.Record(info, uid=uid)
        self.store.write(directory.name, record)
        try:
            await disk.mount(directory, info.spec.limits)
            owner.make_places(directory, uid)
            groups = self.cgroups.create(info.id, info.spec.limits) if self.cgroups else []
            process = self._launch(record, directory, groups)
            started = owner.start_time(process.pid) or ""
            record = dataclasses.replace(record, pid=process.pid, started=started)
            self.store.write(directory.name, record)
            return await self._attach(record, directory, _START_S, process)
        except BaseException:
            await asyncio.shield(self._discard(directory, record))
            raise

    async def close(self) -> None:
        """Removes the service's directories."""
        await self._removals.close()
        for own in (self.own, *self._taken_over):
            await asyncio.to_thread(remove_tree, own)
        self.store.close()

    @property
    def limits(self) -> str:
        """How limits are held, from exact to weak."""
        if self.cgroups:
            return f"cgroup v{self.cgroups.version}"
        if self._root:
            # A user a sandbox: the kernel counts a sandbox's processes; memory is a process's.
            return "rlimits of a user"
        if self.isolation == "bubblewrap":
            return "rlimits in a user namespace"
        # Processes of all the user's programs would count against one sandbox: not limited.
        return "rlimits"

    def health(self) -> dict[str, Any]:
        """How limits are held."""
        return {"limits": self.limits, "disk": disk.held()}

    async def _discard(self, directory: Path, record: owner.Record | None) -> None:
        await self._removals.run(functools.partial(self._remove, directory, record))

    async def _remove(self, directory: Path, record: owner.Record | None) -> None:
        """Kills every process of a sandbox and removes its directory and its group."""
        session = record.pid if record is not None and record.is_alive else None
        uid = None if record is None else record.uid
        marker = f"{_MARKER}={directory.name}".encode()
        # What is frozen does not die of being killed.
        if (freezer := self._freezer(directory)) is not None:
            await freezer.thaw()
        await kill_all(Members(marker, session=session, uid=uid))
        if self.cgroups:
            await self.cgroups.remove(directory.name)
        await disk.unmount(directory)
        await clear(directory, self.store)

    def _freezer(self, directory: Path) -> Freezer | None:
        return self.cgroups.freezer(directory.name) if self.cgroups else None

    async def _attach(
        self,
        record: owner.Record,
        directory: Path,
        patience_s: float,
        process: subprocess.Popen[bytes] | None = None,
    ) -> Box:
        """A sandbox that was launched, once its agent has dialled."""
        spec, isolated = record.info.spec, self.isolation == "bubblewrap"
        link = open_link(directory, spec, record.uid)

        def is_agent(pid: int) -> bool:
            # Bubblewrap itself stays outside and has one child.
            return record.pid == (_parent(pid) if isolated else pid)

        freezer = self._freezer(directory)
        await await_agent(
            link,
            record.pid,
            is_agent,
            freezer,
            paused=record.info.paused_at is not None,
            patience_s=patience_s,
            said=lambda: _last(directory),
        )

        async def close() -> None:
            await self._discard(directory, record)
            if process is not None:
                process.wait()

        return Box(
            record.info,
            open_workspace(directory, spec, record.uid),
            link,
            close=close,
            root="/workspace" if isolated else str(directory / "data/workspace"),
            prelude=self._prelude(spec.limits),
            freezer=freezer,
            tree=open_tree(directory, spec.limits, record.uid),
            places=None if isolated else _places(directory),
        )

    def _launch(
        self, record: owner.Record, directory: Path, groups: list[Path]
    ) -> subprocess.Popen[bytes]:
        """Starts a chain of programs, each replacing the one before it, that ends in the agent."""
        info = record.info
        limits = info.spec.limits
        setup = ["/bin/sh", "-c", _SETUP, "sh", str(len(groups)), *map(str, groups)]
        setup += [str(limits.files_mb * MB // 512), str(limits.open_files)]
        with contextlib.ExitStack() as stack:
            said = stack.enter_context(open(directory / "agent.log", "wb"))
            inherited = []
            if self.isolation == "bubblewrap":
                inherited = [stack.enter_context(open(self.filter, "rb")).fileno()]
                sandbox = bubblewrap.arguments(
                    self.etc,
                    self.agent,
                    directory,
                    filter_fd=inherited[0],
                    shm_bytes=shm_bytes(limits),
                    network=info.spec.network,
                    die_with_parent=not self._durable,
                )
                python, line, agent = bubblewrap.python()[0], LINE_DIR, AGENT_DIR
            else:
                sandbox = self._plain(info, directory)
                system, bound = bubblewrap.python()
                python = sys.executable if bound else system
                line, agent = str(directory / "line"), str(self.agent)
            program = [python, "-ISB", f"{agent}/__main__.py"]
            start = agent_arguments(program, line, info, durable=self._durable)
            return subprocess.Popen(
                [*setup, *_drop(record.uid), *sandbox, *start],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", _MARKER: info.id},
                pass_fds=inherited,
                start_new_session=True,
            )

    def _plain(self, info: SandboxInfo, directory: Path) -> list[str]:
        """The command prefix that only sets the environment."""
        env = {
            **bubblewrap.ENV,
            "HOME": str(directory / "data/home"),
            "TMPDIR": str(directory / "data/tmp"),
            _MARKER: info.id,
        }
        return ["/usr/bin/env", "-i", *(f"{name}={value}" for name, value in env.items())]

    def _prelude(self, limits: Limits) -> str:
        if self.cgroups:
            return ""
        memory = f"ulimit -v {limits.memory_mb * MB // 1024}; "
        return memory + ("" if self.limits == "rlimits" else _PROCESSES.format(limits.pids))


def bubblewrap_problem() -> str | None:
    """Why sandboxes cannot be isolated by bubblewrap here, or None."""
    return bubblewrap.problem(_drop(owner.FIRST_UID if os.geteuid() == 0 else None))


def _places(directory: Path) -> dict[str, str]:
    """Where a sandbox that is not isolated has what others have in fixed places."""
    data = directory / "data"
    return {
        "/workspace": str(data / "workspace"),
        bubblewrap.ENV["HOME"]: str(data / "home"),
        "/tmp": str(data / "tmp"),
    }


def _parent(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1])


def _last(directory: Path) -> str:
    """What the agent, or what should have become it, said last."""
    try:
        lines = (directory / "agent.log").read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return f" It said: {lines[-1]}" if lines else ""


def _drop(uid: int | None) -> list[str]:
    """The command prefix that becomes a user without rights; None stays who this process is."""
    if uid is None:
        return []
    ids = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    return ["setpriv", *ids, "--no-new-privs", "--"]
