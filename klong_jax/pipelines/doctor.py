"""`klong doctor`: what this machine has, and what that allows."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import redis
from rich.console import Console
from rich.table import Table
from rich.text import Text

from klong_jax.pipelines.config.commands import DoctorConfig
from sandbox.doctor import Finding
from sandbox.doctor import findings as sandboxes

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "hydra-core")
_GIB = 2**30


def run(settings: DoctorConfig) -> None:
    """Prints the findings.

    Raises:
        SystemExit: Something required is missing; the status is 1.
    """
    table = Table()
    for heading in ("what", "found", "what that means"):
        table.add_column(heading)
    lacking = []
    for finding in findings(settings):
        mark = "green" if finding.found else "red" if finding.required else "yellow"
        found = Text(finding.found or "missing", style=mark)
        table.add_row(finding.name, found, Text(finding.allows))
        if finding.required and not finding.found:
            lacking.append(finding.name)
    Console().print(table)
    if lacking:
        print(f"required but missing: {', '.join(lacking)}")
        raise SystemExit(1)
    print("everything required is here")


def findings(settings: DoctorConfig) -> Iterator[Finding]:
    """Looks at the machine, one thing after another."""
    yield _python()
    yield from map(_package, _PACKAGES)
    yield _devices()
    yield _cores()
    yield _memory()
    yield _disk(settings.root)
    yield from sandboxes(settings.image)
    yield _redis(settings.redis)


def _python() -> Finding:
    enough = sys.version_info >= (3, 11)
    said = "Runs klong." if enough else "Install Python 3.11 or later."
    return Finding("python", platform.python_version() if enough else "", said, required=True)


def _package(name: str) -> Finding:
    try:
        return Finding(name, version(name), "Installed.", required=True)
    except PackageNotFoundError:
        return Finding(name, "", "Install it: pip install -e .", required=True)


def _devices() -> Finding:
    try:
        import jax

        devices = jax.devices()
    except (ImportError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        return Finding("devices", "", f"JAX has no device to compute on: {said}", required=True)
    kinds = sorted({f"{device.platform} {device.device_kind}" for device in devices})
    if devices[0].platform == "cpu":
        said = "Trains the tiny models of the recipe; real ones need a TPU or GPU build of jaxlib."
    else:
        said = "Trains real models."
    return Finding("devices", f"{len(devices)} x {', '.join(kinds)}", said, required=True)


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("cores", str(count), "Sandboxes and, without accelerators, training share them.")


def _memory() -> Finding:
    # Imported on use: what is missing is told first.
    from klong_jax.parallel.memory import host_memory

    total = host_memory() / _GIB
    said = "Enough for the recipe." if total >= 4 else "The recipe may need 4 GiB."
    return Finding("memory", f"{total:.1f} GiB", said)


def _disk(root: Path) -> Finding:
    try:
        free = shutil.disk_usage(root).free / _GIB
    except OSError as error:
        return Finding("disk", "", f"{root}: {error.strerror}; give an existing folder as root.")
    said = "Enough for the recipe." if free >= 2 else "Free some: the recipe may need 2 GiB."
    return Finding("disk", f"{free:.1f} GiB free", said)


def _redis(url: str) -> Finding:
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=3, socket_timeout=3) as client:
            found = str(client.info("server")["redis_version"])
    except ValueError as error:
        return Finding("redis", "", f"redis={url} is not a Redis URL: {error}.")
    except redis.RedisError:
        said = "None answers: rollouts of one host queue in an SQLite file, as by default."
        return Finding("redis", "", said)
    return Finding("redis", found, "Workers on many hosts can share one rollout queue.")
