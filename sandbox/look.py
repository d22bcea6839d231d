"""What runs in a sandbox at a moment, as far as a snapshot can tell of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.api import check_session
from sandbox.errors import SandboxLost, SandboxRefused
from sandbox.protocol import Header

MAX_BYTES = 1 << 20
"""Bytes of an agent's answer; it leaves out environments that would make it longer."""


@dataclass(frozen=True)
class Shell:
    """The shell of a session.

    Attributes:
        name: Of the session.
        cwd: Its directory, as an isolated sandbox has it; None: unknown or removed.
        env: Exported variables that the sandbox's own environment has not, or otherwise.
        unset: Variables of the sandbox's environment that it has not.
        whole: Whether those are of the moment, not of when it was opened.
    """

    name: str
    cwd: str | None
    env: Mapping[str, str]
    unset: Sequence[str]
    whole: bool


@dataclass(frozen=True)
class Look:
    """The sessions, and how many processes there are beside them."""

    shells: tuple[Shell, ...]
    processes: int


def read_look(header: Header, payload: bytes, places: Mapping[str, str]) -> Look:
    """Reads the answer of an agent, which may say anything.

    Args:
        header: Of the answer.
        payload: Its sessions.
        places: Paths as this sandbox has them, by what an isolated one has in their stead.

    Raises:
        SandboxLost: it is none.
    """
    try:
        shells = tuple(_shell(places, **fields) for fields in json.loads(payload))
        processes = header["processes"]
        if not (isinstance(processes, int) and processes >= 0):
            raise ValueError(processes)
        if len({shell.name for shell in shells}) < len(shells):
            raise ValueError("two sessions of a name")
    except (KeyError, TypeError, ValueError, RecursionError, SandboxRefused):
        raise SandboxLost("the agent inside the sandbox sent sessions that are none.") from None
    return Look(shells, processes)


def _shell(places: Mapping[str, str], *, cwd: Any, **fields: Any) -> Shell:
    texts = [fields["name"], *fields["env"], *fields["env"].values(), *fields["unset"]]
    # Any bytes may be a name or a value, and Python has a text for those.
    if not all(b"\0" not in os.fsencode(text) for text in texts):
        raise ValueError("a text that is none")
    if not all(name and "=" not in name for name in (*fields["env"], *fields["unset"])):
        raise ValueError("a name that is none")
    check_session(fields["name"])
    if cwd is not None:
        if b"\0" in os.fsencode(cwd) or not cwd.startswith("/"):
            raise ValueError(cwd)
        cwd = _moved(cwd, {here: there for there, here in places.items()})
    return Shell(cwd=cwd, **{**fields, "whole": fields["whole"] is True})


def inside(cwd: str | None, places: Mapping[str, str]) -> str:
    """A shell's directory as the sandbox of `places` has it."""
    return _moved("/workspace" if cwd is None else cwd, places)


def _moved(path: str, places: Mapping[str, str]) -> str:
    for old, new in places.items():
        if path == old or path.startswith(f"{old}/"):
            return new + path[len(old) :]
    return path
