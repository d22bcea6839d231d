"""What a backend is: it makes boxes; a box runs commands and has a workspace."""

from __future__ import annotations

from typing import Any, Protocol

from sandbox.api import ExecRequest, ExecResult, Isolation, SandboxSpec
from sandbox.workspace import Workspace


class Box(Protocol):
    """One sandbox of a backend."""

    @property
    def workspace(self) -> Workspace:
        """The files that its commands see as their working directory."""

    async def exec(self, request: ExecRequest) -> ExecResult:
        """Runs one command; everything it started is dead when this returns or is cancelled."""

    async def close(self) -> None:
        """Kills what runs and removes everything; called once."""


class Backend(Protocol):
    """A way to make sandboxes on this host."""

    @property
    def name(self) -> str:
        """The name that callers choose it by."""

    @property
    def isolation(self) -> Isolation:
        """What separates a sandbox from the host."""

    async def start(self) -> None:
        """Checks that it can work here and reaps what dead services left.

        Raises:
            SandboxUnavailable: it cannot work here; the message says what is missing.
        """

    async def create(self, sandbox_id: str, spec: SandboxSpec) -> Box:
        """Makes a sandbox.

        Raises:
            SandboxRefused: the backend cannot give what the spec asks.
        """

    async def close(self) -> None:
        """Removes what the backend itself keeps, after its boxes are closed."""

    def health(self) -> dict[str, Any]:
        """Facts for the service's health answer."""
