"""Backends by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sandbox.backends.base import Backend
from sandbox.backends.box import Box
from sandbox.backends.local import LocalBackend
from sandbox.errors import SandboxUnavailable

if TYPE_CHECKING:
    from sandbox.backends.kubernetes.options import Options

__all__ = ["Backend", "BackendName", "Box", "open_backend"]

BackendName = Literal["local", "docker", "kubernetes"]


def open_backend(
    name: BackendName,
    *,
    isolation: Literal["auto", "bubblewrap", "none"] = "auto",
    state_dir: Path | None = None,
    durable: bool = False,
    cluster: Options | None = None,
) -> Backend:
    """A backend that is not started yet; `isolation` is the local one's, `cluster` Kubernetes'."""
    if name == "kubernetes":
        try:
            from sandbox.backends.kubernetes.backend import KubernetesBackend
        except ImportError:
            raise SandboxUnavailable(
                "backend kubernetes: its client is missing; pip install 'klong-jax[kubernetes]'."
            ) from None
        return KubernetesBackend(cluster, state_dir=state_dir, durable=durable)
    if name == "docker":
        # Imported here, for a host without the Docker SDK can run the local backend.
        from sandbox.backends.docker import DockerBackend

        return DockerBackend(state_dir=state_dir, durable=durable)
    return LocalBackend(isolation=isolation, state_dir=state_dir, durable=durable)
