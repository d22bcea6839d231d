"""Hostile programs that run inside a sandbox: what they share, and how they are run.

Their modules are copied into the sandbox; its own Python runs them, so they are of the standard
library alone. `main` reads facts of the outside as JSON and prints what each program came to: what
it says, or the name of the error or of the signal that stopped it. The list is the tests' and the
README's, too.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

# The calls' numbers by name, the service's port, and the names of things of the host.
FACTS: dict[str, Any] = {}

_LIBC = ctypes.CDLL(None, use_errno=True)


class Attack(NamedTuple):
    """What is tried, what comes of it, and why; `docker` where that differs there."""

    what: str
    outcome: str
    mechanism: str
    docker: str
    program: Callable[[], str]


ATTACKS: list[Attack] = []


def attack(
    what: str, outcome: str, mechanism: str, docker: str = ""
) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def add(program: Callable[[], str]) -> Callable[[], str]:
        ATTACKS.append(Attack(what, outcome, mechanism, docker or outcome, program))
        return program

    return add


def call(name: str, *args: int) -> int:
    return call_number(FACTS["calls"][name], *args)


def call_number(number: int, *args: int) -> int:
    result = _LIBC.syscall(number, *(ctypes.c_ulong(arg) for arg in args))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


def outcome_of(program: Callable[[], str]) -> str:
    try:
        return program()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    except Exception as error:
        return type(error).__name__


def each(programs: list[Callable[[], str]]) -> str:
    """The outcomes that several tries have in all."""
    return ", ".join(sorted({outcome_of(program) for program in programs}))


def opened(*paths: str, flags: int = os.O_RDONLY) -> str:
    """What comes of opening files, each of which would be a success."""
    return each([lambda path=path: f"opened {os.open(path, flags)}" for path in paths])


def _in_child(program: Callable[[], str]) -> str:
    """The outcome of a program that may not come back."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.write(write_end, outcome_of(program).encode()[:4000])
        os._exit(0)
    os.close(write_end)
    ready = select.select([read_end], [], [], 20)[0]
    said = os.read(read_end, 4000).decode() if ready else ""
    os.close(read_end)
    if not ready:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return said or (signal.Signals(status & 0x7F).name if ready else "does not end")


def main() -> None:
    """Runs the list, each program in a process of its own."""
    FACTS.update(json.load(sys.stdin))
    print(json.dumps({a.what: _in_child(a.program) for a in ATTACKS}))
