"""File access to a sandbox from outside, wherever its workspace is."""

from __future__ import annotations

import asyncio
from io import BytesIO
from typing import Any, BinaryIO, Protocol

from sandbox import archive
from sandbox.agent.transfer import CHUNK
from sandbox.api import new_operation
from sandbox.errors import SandboxLost
from sandbox.link import Answer, Link
from sandbox.workspace import Workspace

# Seconds for the agent to move one chunk, or to write what it has.
_PATIENCE_S = 300.0


class Files(Protocol):
    """The files of one sandbox's workspace.

    What moves bytes blocks, and is called in a thread other than the event loop's.
    """

    max_bytes: int

    def read(self, path: str) -> bytes:
        """The bytes of one regular file."""

    def write(self, path: str, source: BinaryIO) -> None:
        """Replaces one regular file atomically; missing directories are made."""

    def pack(self, out: BinaryIO) -> None:
        """Writes the tree as `sandbox.archive` does."""

    def unpack(self, source: BinaryIO) -> None:
        """Writes the members of an uncompressed tar over the workspace."""

    async def check_directory(self, path: str) -> None:
        """Checks that `path` is a directory of the workspace, reached without symbolic links."""


class HostFiles(Workspace):
    """A workspace that is a directory of this host."""

    def pack(self, out: BinaryIO) -> None:
        """Writes the tree as `sandbox.archive` does."""
        archive.pack(self, out)

    def unpack(self, source: BinaryIO) -> None:
        """Writes the members of an uncompressed tar over the workspace."""
        archive.unpack(self, source)

    async def check_directory(self, path: str) -> None:
        """Checks that `path` is a directory of the workspace, reached without symbolic links."""
        self.directory(path)


class LineFiles:
    """A workspace that only the agent reaches, which does as `Workspace` does, over its line."""

    def __init__(self, link: Link, *, root: str, max_bytes: int) -> None:
        """Describes it.

        Args:
            link: The line to the agent.
            root: The workspace's path inside.
            max_bytes: Largest file, and largest tree.
        """
        self.max_bytes = max_bytes
        self._link, self._root = link, root
        self._loop = asyncio.get_running_loop()

    def read(self, path: str) -> bytes:
        """The bytes of one regular file."""
        out = BytesIO()
        self._download("read", path, out)
        return out.getvalue()

    def write(self, path: str, source: BinaryIO) -> None:
        """Replaces one regular file atomically; missing directories are made."""
        self._upload("write", path, source)

    def pack(self, out: BinaryIO) -> None:
        """Writes the tree as `sandbox.archive` does."""
        self._download("pack", "", out)

    def unpack(self, source: BinaryIO) -> None:
        """Writes the members of an uncompressed tar over the workspace."""
        self._upload("unpack", "", source)

    async def check_directory(self, path: str) -> None:
        """Checks that `path` is a directory of the workspace, reached without symbolic links."""
        if path != ".":
            header = {"op": "directory", "root": self._root, "path": path}
            await self._link.call(header, timeout_s=_PATIENCE_S)

    def _download(self, kind: str, path: str, out: BinaryIO) -> None:
        transfer = self._begin(kind, path)
        answer, data = self._call(transfer)
        taken = 0
        while True:
            out.write(data)
            taken += len(data)
            # A tree has headers beside its files; no agent sends as much again of them.
            if taken > 2 * self.max_bytes + CHUNK:
                raise SandboxLost("the agent inside the sandbox sends files without end.")
            if answer.get("more") is not True:
                return
            answer, data = self._call({"op": "move", "transfer": transfer["id"]})

    def _upload(self, kind: str, path: str, source: BinaryIO) -> None:
        transfer = header = self._begin(kind, path)
        chunk = source.read(CHUNK)
        while True:
            following = source.read(CHUNK)
            header["last"] = not following
            self._call(header, chunk)
            if not following:
                return
            chunk, header = following, {"op": "move", "transfer": transfer["id"]}

    def _begin(self, kind: str, path: str) -> dict[str, Any]:
        return {
            "op": "transfer",
            "id": new_operation(),
            "kind": kind,
            "root": self._root,
            "path": path,
            "max": self.max_bytes,
        }

    def _call(self, header: dict[str, Any], payload: bytes = b"") -> Answer:
        call = self._link.call(header, payload, timeout_s=_PATIENCE_S)
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()
