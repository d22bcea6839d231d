"""Backends by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sandbox.backends.base import Backend, Box
from sandbox.backends.local import LocalBackend

__all__ = ["Backend", "BackendName", "Box", "open_backend"]

BackendName = Literal["local", "docker"]


def open_backend(
    name: BackendName,
    *,
    isolation: Literal["auto", "bubblewrap", "none"] = "auto",
    state_dir: Path | None = None,
    durable: bool = False,
) -> Backend:
    """A backend that is not started yet; `isolation` is the local backend's."""
    if name == "docker":
        # Imported here, for a host without the Docker SDK can run the local backend.
        from sandbox.backends.docker import DockerBackend

        return DockerBackend(state_dir=state_dir, durable=durable)
    return LocalBackend(isolation=isolation, state_dir=state_dir, durable=durable)
