"""Sandboxes of this host: one bubblewrap a command, or plain processes where there is none."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
from pathlib import Path
from typing import Any, Literal

from sandbox import owner
from sandbox.api import MB, ExecRequest, ExecResult, Isolation, SandboxSpec
from sandbox.backends import bubblewrap, cgroups
from sandbox.backends.processes import Members, kill_all
from sandbox.errors import SandboxRefused, SandboxUnavailable
from sandbox.process import Command, run
from sandbox.workspace import Workspace, remove_tree, split_path

log = logging.getLogger("sandbox")

# Users for sandboxes under root are drawn from here, far above those of people and packages.
_FIRST_UID, _LAST_UID = 1 << 30, (1 << 31) - 2

# Variables that mark the processes of a sandbox, and of one command.
_SANDBOX, _RUN = "KLONG_SANDBOX", "KLONG_EXEC"

# Joins control groups, sets limits, then becomes the real command; $1 counts the groups.
_SETUP = """n=$1; shift
while [ "$n" -gt 0 ]; do echo 0 >"$1" || exit 125; shift; n=$((n-1)); done
ulimit -c 0; ulimit -f "$1"; ulimit -v "$2"
if [ "$3" = unlimited ]; then :; elif [ "$BASH_VERSION" ]; then ulimit -u "$3"
else ulimit -p "$3"; fi
shift 3; exec "$@"
"""


class LocalBackend:
    """Runs commands on this host."""

    name = "local"

    def __init__(
        self,
        *,
        isolation: Literal["auto", "bubblewrap", "none"] = "auto",
        state_dir: Path | None = None,
    ) -> None:
        """Describes the backend; `start` checks it.

        Args:
            isolation: "auto" takes bubblewrap where it works.
            state_dir: Where workspaces live; None is a directory in the temporary one.
        """
        self.isolation: Isolation = "none" if isolation == "none" else "bubblewrap"
        self._may_fall_back = isolation == "auto"
        self._state_dir = (state_dir or owner.default_state_dir()) / "local"
        self._root = os.geteuid() == 0
        self.cgroups: cgroups.Cgroups | None = None

    async def start(self) -> None:
        """Chooses isolation and limits, and reaps what dead services left."""
        if self.isolation == "bubblewrap":
            problem = bubblewrap.problem(_drop(_FIRST_UID if self._root else None))
            if problem and not self._may_fall_back:
                raise SandboxUnavailable(f"bubblewrap isolation cannot be had: {problem}.")
            if problem:
                self.isolation = "none"
        if self.isolation == "none":
            log.warning("sandboxes are not isolated (isolation: none): run only trusted commands")
        self.cgroups = cgroups.detect()
        await self._reap()
        self.own = owner.claim(self._state_dir)
        self.etc = self.own / "etc"
        await asyncio.to_thread(bubblewrap.install, self.etc)

    async def create(self, sandbox_id: str, spec: SandboxSpec) -> LocalBox:
        """Makes the directories and the control group of a sandbox."""
        if spec.image is not None:
            raise SandboxRefused(
                "image: the local backend has no images; leave it out or use --backend docker."
            )
        uid = random.SystemRandom().randint(_FIRST_UID, _LAST_UID) if self._root else None
        directory = owner.make_box_directory(self.own, sandbox_id, uid)
        try:
            groups = self.cgroups.create(sandbox_id, spec.limits) if self.cgroups else []
        except OSError:
            await self.discard(directory, sandbox_id, uid)
            raise
        return LocalBox(self, sandbox_id, spec, directory, uid, groups)

    async def close(self) -> None:
        """Removes the service's directory."""
        await asyncio.to_thread(remove_tree, self.own)

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
        return {"limits": self.limits}

    async def discard(self, directory: Path, sandbox_id: str, uid: int | None) -> None:
        """Kills every process of a sandbox and removes its directory and its group."""
        await kill_all(Members(_marker(sandbox_id).encode(), uid=uid))
        if self.cgroups:
            await self.cgroups.remove(sandbox_id)
        await asyncio.to_thread(remove_tree, directory)

    async def _reap(self) -> None:
        for dead in owner.abandoned(self._state_dir):
            for directory in owner.box_directories(dead):
                log.info("reaping sandbox %s of a dead service", directory.name)
                uid = directory.stat().st_uid
                for part in directory.iterdir():
                    uid = max(uid, part.stat().st_uid)
                own_user = uid if _FIRST_UID <= uid <= _LAST_UID else None
                await self.discard(directory, directory.name, own_user)
            await asyncio.to_thread(remove_tree, dead)


class LocalBox:
    """One sandbox of the local backend."""

    def __init__(
        self,
        backend: LocalBackend,
        sandbox_id: str,
        spec: SandboxSpec,
        directory: Path,
        uid: int | None,
        groups: list[Path],
    ) -> None:
        """Wraps what `LocalBackend.create` made."""
        self.workspace = Workspace(
            directory / "workspace", owner=uid, max_bytes=spec.limits.files_mb * MB
        )
        self._backend, self._id, self._spec = backend, sandbox_id, spec
        self._directory, self._uid, self._groups = directory, uid, groups
        self._running = 0

    async def exec(self, request: ExecRequest) -> ExecResult:
        """Runs one command."""
        self.workspace.directory(request.cwd)
        cwd = "/".join(split_path(request.cwd))
        run_id = secrets.token_hex(8)
        markers = {_SANDBOX: self._id, _RUN: run_id}
        isolated = self._backend.isolation == "bubblewrap"

        async def sweep(pid: int, by_itself: bool) -> None:
            # The end of bubblewrap's first process ends all in its namespace, but one killed
            # while it sets up may leave a child that does not yet die with it.
            if isolated and by_itself:
                return
            alone = self._uid if self._running == 1 else None
            await kill_all(Members(f"{_RUN}={run_id}".encode(), session=pid, uid=alone))

        self._running += 1
        try:
            return await run(
                Command(
                    argv=self._argv(request, cwd, markers),
                    # What runs before the drop to the sandbox's user must not see its variables.
                    env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **markers},
                    cwd=self._directory / "workspace" / cwd,
                    stdin=request.stdin.encode(),
                    timeout_s=request.timeout_s,
                    output_bytes=request.output_bytes or self._spec.limits.output_bytes,
                    sweep=sweep,
                )
            )
        finally:
            self._running -= 1

    async def close(self) -> None:
        """Kills what runs and removes the directories."""
        await self._backend.discard(self._directory, self._id, self._uid)

    def _argv(self, request: ExecRequest, cwd: str, markers: dict[str, str]) -> list[str]:
        """The chain of programs that ends in the command; each replaces the one before it."""
        sandbox, drop = self._sandbox(request, cwd, markers), _drop(self._uid)
        shell = ["/bin/sh", "-c", request.command]
        if self._backend.limits == "rlimits in a user namespace":
            return [*sandbox, *self._limits(), *shell]
        return [*self._limits(), *drop, *sandbox, *shell]

    def _sandbox(self, request: ExecRequest, cwd: str, markers: dict[str, str]) -> list[str]:
        env = {**self._spec.env, **request.env, **markers}
        if self._backend.isolation == "bubblewrap":
            network = self._spec.network
            env = {**bubblewrap.ENV, **env}
            return bubblewrap.arguments(
                self._backend.etc, self._directory, cwd=cwd, env=env, network=network
            )
        home, tmp = str(self._directory / "home"), str(self._directory / "tmp")
        env = {**bubblewrap.ENV, "HOME": home, "TMPDIR": tmp, **env}
        return ["/usr/bin/env", "-i", *(f"{key}={value}" for key, value in env.items())]

    def _limits(self) -> list[str]:
        """The command prefix that joins control groups and sets resource limits."""
        limits = self._spec.limits
        blocks = str(limits.files_mb * MB // 512)
        memory = processes = "unlimited"
        if not self._groups:
            memory = str(limits.memory_mb * MB // 1024)
            if self._backend.limits != "rlimits":
                processes = str(limits.pids)
        groups = [str(path) for path in self._groups]
        prefix = ["/bin/sh", "-c", _SETUP, "sh", str(len(groups)), *groups]
        return [*prefix, blocks, memory, processes]


def _marker(sandbox_id: str) -> str:
    return f"{_SANDBOX}={sandbox_id}"


def _drop(uid: int | None) -> list[str]:
    """The command prefix that becomes a user without rights; None stays who this process is."""
    if uid is None:
        return []
    ids = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    return ["setpriv", *ids, "--no-new-privs", "--"]
