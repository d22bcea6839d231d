"""What this host can do for sandboxes, and what it lacks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox.backends import bubblewrap, cgroups
from sandbox.backends.kubernetes.options import Options
from sandbox.backends.local import bubblewrap_problem
from sandbox.egress import install

_PATIENCE_S = 10

# Kernel settings that forbid unprivileged user namespaces, which bubblewrap needs.
_NAMESPACES = {
    "user/max_user_namespaces": "0",
    "kernel/unprivileged_userns_clone": "0",
    "kernel/apparmor_restrict_unprivileged_userns": "1",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked for.

    Attributes:
        name: What was looked for.
        found: What is there, such as a version; empty if it is missing.
        allows: What it allows, or what its absence costs and how to get it.
        required: Whether nothing works without it.
    """

    name: str
    found: str
    allows: str
    required: bool = False


def findings(image: str, cluster: Options | None = None) -> Iterator[Finding]:
    """Looks at the host, one thing after another.

    Args:
        image: Docker image that sandboxes get by default.
        cluster: Of the Kubernetes backend; None takes its defaults.
    """
    yield _bubblewrap()
    yield _control_groups()
    yield _egress()
    yield from _docker(image)
    yield from _kubernetes(cluster or Options())


def _kubernetes(cluster: Options) -> Iterator[Finding]:
    try:
        from sandbox.backends.kubernetes.check import look
    except ImportError:
        without = "its Python package is missing (pip install 'klong-jax[kubernetes]')."
        yield Finding("kubernetes", "", f"backend=kubernetes cannot be used: {without}")
        return
    for row in asyncio.run(look(cluster)):
        yield Finding(*row)


def _bubblewrap() -> Finding:
    problem = bubblewrap_problem()
    if problem is None:
        python = bubblewrap.python()[0]
        return Finding(
            "bubblewrap",
            "works",
            f"The local backend isolates without Docker; agents run {python}.",
        )
    forbidding = [
        f"sysctl {name.replace('/', '.')} is {value}"
        for name, value in _NAMESPACES.items()
        if _sysctl(name) == value
    ]
    said = "; ".join([problem.strip().splitlines()[-1], *forbidding])
    return Finding("bubblewrap", "", f"The local backend runs commands without isolation: {said}.")


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""


def _control_groups() -> Finding:
    groups = cgroups.detect()
    if groups is None:
        without = "The local backend limits each process of a sandbox, not all together."
        return Finding("control groups", "", f"{without} Run as root, or where they are writable.")
    said = "The local backend limits memory, processes and CPU of a sandbox as a whole."
    return Finding("control groups", f"version {groups.version}", said)


def _egress() -> Finding:
    if install.is_complete():
        said = "Sandboxes can reach what their egress policy allows."
        return Finding("egress engine", str(install.directory()), said)
    return Finding("egress engine", "", f"Sandboxes have no egress: {install.REMEDY}.")


def _docker(image: str) -> Iterator[Finding]:
    without = "backend=docker cannot be used; backend=local can."
    try:
        # Imported here, for a host without the Docker SDK can run the local backend.
        import docker
        from docker.errors import DockerException, ImageNotFound
        from requests.exceptions import RequestException
    except ImportError:
        yield Finding(
            "docker daemon", "", f"Its Python package is missing (pip install docker): {without}"
        )
        return
    try:
        client = docker.from_env(timeout=_PATIENCE_S)
        server = client.version()["Version"]
    except (DockerException, RequestException):
        yield Finding("docker daemon", "", f"None answers: {without}")
        return
    try:
        yield Finding("docker daemon", server, "backend=docker runs sandboxes as containers.")
        client.images.get(image)
        yield Finding("sandbox image", image, "The docker backend's default image is ready.")
    except ImageNotFound:
        yield Finding("sandbox image", "", f"Build {image} with klong sandbox image build.")
    except (DockerException, RequestException) as error:
        yield Finding("sandbox image", "", f"The daemon does not say: {error}")
    finally:
        client.close()
