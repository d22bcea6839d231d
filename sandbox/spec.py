"""What a sandbox is asked to be: image, limits, network, lifetime, and what names it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field

from sandbox.egress.blocks import prefix_of
from sandbox.egress.packages import name_of
from sandbox.egress.policy import pattern_of
from sandbox.errors import SandboxRefused

MB = 1_000_000

Isolation = Literal["bubblewrap", "none", "docker", "kubernetes"]

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Env = Mapping[_Name, Text]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_ID = re.compile(r"sb-[a-z0-9]{8,40}")


def _checked(read: Callable[[str], object]) -> AfterValidator:
    """Refuses what cannot be read, and keeps the text."""

    def check(text: str) -> str:
        read(text)
        return text

    return AfterValidator(check)


def new_id() -> str:
    """A fresh sandbox id, unguessable."""
    return f"sb-{secrets.token_hex(8)}"


def check_id(sandbox_id: str) -> None:
    """Refuses an id that no client of this package would choose.

    Raises:
        SandboxRefused: it has not the form of `new_id`; it names directories and groups.
    """
    if not _ID.fullmatch(sandbox_id):
        raise SandboxRefused(
            f"id {sandbox_id!r}: a sandbox's id is sb- and 8 to 40 small letters or digits."
        )


@dataclass(frozen=True)
class Limits:
    """What one sandbox may use."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    cpus: Annotated[float, Field(ge=0.05)] = 1.0
    """CPU cores, shared by all commands of the sandbox."""
    memory_mb: Annotated[int, Field(ge=16)] = 2048
    """Megabytes (10^6 bytes) of memory, swap included."""
    pids: Annotated[int, Field(ge=8)] = 256
    """Processes and threads alive at once, the sandbox's own few included."""
    open_files: Annotated[int, Field(ge=64, le=1_048_576)] = 4096
    """Descriptors that one process may have open."""
    files_mb: Annotated[int, Field(ge=1)] = 1024
    """Megabytes of the largest file a command may write, and of the largest transfer."""
    disk_mb: Annotated[int, Field(ge=8)] | None = None
    """Megabytes of all files together: workspace, home and /tmp; None: as many as the host has.
    Needs a service that runs as root, and `mkfs.ext4`."""
    inodes: Annotated[int, Field(ge=64)] | None = None
    """Files, directories and links together; needs `disk_mb`. None: one for each 16 kB of it."""
    output_bytes: Annotated[int, Field(ge=256, le=16_777_216)] = 262_144
    """Bytes kept of each of stdout and stderr; the middle of a longer output is left out."""


@dataclass(frozen=True)
class Egress:
    """What of the network the commands of a sandbox may reach, by one proxy.

    Attributes:
        allow: Hosts: a name, `*.` and a name for all below it, or `*` for all.
        block: URLs, `https://HOST/PATH`, that are refused with all below them; of a repository,
            what other hosts are known to serve of it, too.
        packages: Package indexes that are offered, for reading.
        block_packages: Names of packages that are refused, whatever host would give them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    allow: tuple[Annotated[str, _checked(pattern_of)], ...] = ()
    block: tuple[Annotated[str, _checked(prefix_of)], ...] = ()
    packages: tuple[Literal["pypi", "npm"], ...] = ()
    block_packages: tuple[Annotated[str, _checked(name_of)], ...] = ()


@dataclass(frozen=True)
class SandboxSpec:
    """What a sandbox should be.

    Attributes:
        image: Docker image, or None for the backend's default; the local backend has no images.
        limits: What its commands may use together.
        env: Environment variables of every command.
        labels: Free text kept with the sandbox and shown in listings.
        lifetime_s: Seconds after which the service removes it.
        idle_s: Seconds without a request after which the service removes it; a running command is
            a request, a session or its background job none. None: never.
        network: Whether its commands may reach the network, unjudged.
        egress: What of the network they may reach by the proxy; None is nothing.
        snapshot: Digest of the snapshot whose files and sessions it begins with.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    image: str | None = None
    limits: Limits = field(default_factory=Limits)
    env: Env = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    lifetime_s: Annotated[float, Field(gt=0)] = 86_400.0
    idle_s: Annotated[float, Field(gt=0)] | None = None
    network: bool = False
    egress: Egress | None = None
    snapshot: Digest | None = None


@dataclass(frozen=True)
class Gates:
    """What the service asks of a sandbox's work, whoever asks for it.

    Attributes:
        reading: Texts that must have been taken one and all before any work, in order.
        finish_check: Command that must succeed in the sandbox before it may end; may be empty.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    reading: tuple[str, ...] = ()
    finish_check: Text = ""
