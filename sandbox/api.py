"""What travels between client and service: requests and results, with their validation."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from sandbox.errors import SandboxRefused
from sandbox.spec import STRICT, Env, Gates, Isolation, SandboxSpec, Text

_SESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

_Operation = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{8,64}$")]


def new_operation() -> str:
    """A fresh operation id."""
    return f"op-{secrets.token_hex(8)}"


def check_session(name: str) -> None:
    """Refuses what is no name of a session.

    Raises:
        SandboxRefused: it is not of letters, digits and `_.-`, or too long.
    """
    if not _SESSION.fullmatch(name):
        raise SandboxRefused(
            f"session {name!r}: a name is of up to 64 letters, digits and '_.-', "
            "a letter or digit first."
        )


@dataclass(frozen=True)
class SandboxInfo:
    """A sandbox as the service sees it; times are Unix seconds."""

    id: str
    backend: str
    isolation: Isolation
    created_at: float
    expires_at: float
    spec: SandboxSpec
    paused_at: float | None = None
    """Since when its processes are stopped; None while they run."""


@dataclass(frozen=True)
class Event:
    """Something that was done to a sandbox, or in it.

    Attributes:
        number: Grows with time; unique in a state directory.
        at: Unix seconds.
        kind: What, as `sandbox.manager` names it: "create", "exec", "exit", "close" ...
        facts: The rest, by name.
    """

    number: int
    at: float
    kind: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class ExecRequest:
    """One command, run by `sh -c` in the workspace.

    Attributes:
        command: Shell text.
        timeout_s: Seconds until the command and everything it started are killed.
        cwd: Directory relative to the workspace.
        env: Variables on top of the sandbox's.
        stdin: Text given on standard input.
        output_bytes: Bytes kept of each stream; None takes the sandbox's limit, and may only
            be smaller than it.
        operation: Chosen by a caller that will ask again if it gets no answer: the command then
            runs once however often it asks, is not ended by a broken connection, and its result
            is kept until acknowledged. None: the command ends with its caller's connection.
        acknowledge: Operations whose results have arrived.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    command: Text
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    cwd: str = "."
    env: Env = field(default_factory=dict)
    stdin: str = ""
    output_bytes: Annotated[int, Field(ge=256)] | None = None
    operation: _Operation | None = None
    acknowledge: tuple[_Operation, ...] = ()


@dataclass(frozen=True)
class SessionRequest:
    """A shell that lives between commands.

    Attributes:
        cwd: Directory relative to the workspace that it starts in.
        env: Variables on top of the sandbox's.
        operation: As in `ExecRequest`.
        acknowledge: As in `ExecRequest`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    cwd: str = "."
    env: Env = field(default_factory=dict)
    operation: _Operation | None = None
    acknowledge: tuple[_Operation, ...] = ()


@dataclass(frozen=True)
class RunRequest:
    """One command of a session.

    Attributes:
        command: Shell text; its directory, variables and jobs last.
        timeout_s: Seconds until what it started is killed, and the shell if that does not
            bring it back.
        operation: As in `ExecRequest`.
        acknowledge: As in `ExecRequest`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    command: Text
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    operation: _Operation | None = None
    acknowledge: tuple[_Operation, ...] = ()


@dataclass(frozen=True)
class EndRequest:
    """The end of a sandbox's work.

    Attributes:
        timeout_s: Seconds until the finish check is killed, and has failed.
        operation: As in `ExecRequest`.
        acknowledge: As in `ExecRequest`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    operation: _Operation | None = None
    acknowledge: tuple[_Operation, ...] = ()


@dataclass(frozen=True)
class ExecResult:
    """How a command ended.

    Attributes:
        exit_code: Exit status, 128 + n when ended by signal n; None when timed out.
        stdout: Kept text, with one marker line in place of a left-out middle.
        stderr: The same for standard error.
        timed_out: Whether it was killed at `timeout_s`.
        duration_s: Wall-clock seconds, measured inside the sandbox.
        stdout_bytes: Bytes printed, kept or not.
        stderr_bytes: The same for standard error.
    """

    exit_code: int | None
    stdout: str
    stderr: str
    timed_out: bool
    duration_s: float
    stdout_bytes: int
    stderr_bytes: int


@dataclass(frozen=True)
class SessionResult(ExecResult):
    """How a command of a session ended.

    Attributes:
        ended: Whether the session ended with it: it left the shell, or the shell had to be killed.
    """

    ended: bool


@dataclass(frozen=True)
class SnapshotSession:
    """A session as a snapshot has it; a restore opens a shell with its directory and environment.

    Attributes:
        name: Its name.
        cwd: Its directory as an isolated sandbox has it, such as /workspace/src; None if it was
            not to be had, or was removed: a restore then takes the workspace.
        whole: Whether the environment is that of the moment. While a command runs it is the one
            that the session was opened with.
    """

    name: str
    cwd: str | None
    whole: bool


@dataclass(frozen=True)
class SnapshotInfo:
    """The files and sessions of a sandbox at a moment, kept until they are deleted.

    Attributes:
        digest: Of the files, with modes and times, and of the sessions: its name.
        sandbox: The sandbox that it was last taken of.
        created_at: When that was, in Unix seconds.
        files: Regular files in workspace and home.
        bytes: Bytes in them; equal ones are stored once.
        skipped: Pipes, sockets and devices, which are not kept.
        frozen: Whether the sandbox stood still while it was read; if not, files that were
            written meanwhile may be of different moments.
        lost_processes: Processes, shells of sessions apart, that a restore does not bring back.
        sessions: The sessions that a restore opens again, by name.
    """

    digest: str
    sandbox: str
    created_at: float
    files: int
    bytes: int
    skipped: int
    frozen: bool
    lost_processes: int
    sessions: tuple[SnapshotSession, ...]


T = TypeVar("T")
_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {
    cls: TypeAdapter(cls)
    for cls in (
        SandboxSpec,
        SandboxInfo,
        Gates,
        ExecRequest,
        SessionRequest,
        RunRequest,
        EndRequest,
        SnapshotInfo,
    )
}


def parse(cls: type[T], body: str | bytes) -> T:
    """Reads one of this module's dataclasses from JSON text.

    Raises:
        SandboxRefused: the text is not such an object; the message names the first bad field.
    """
    try:
        value: T = _ADAPTERS[cls].validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the request body"
        raise SandboxRefused(f"{place}: {first['msg']}.") from None
    return value


def to_json(value: Any) -> dict[str, Any]:
    """The plain dict of one of this module's dataclasses, for JSON."""
    return dataclasses.asdict(value)
