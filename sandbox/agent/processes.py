"""The processes that the agent can see, and their end."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress

_LIBC = ctypes.CDLL(None, use_errno=True)
_SET_DUMPABLE, _SET_SECCOMP, _SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVS = 4, 22, 36, 38
_FILTER = 2

# Rounds of stopping what appeared since the last; a fork bomb hits the limit of processes sooner.
_ROUNDS = 50


class Process:
    """A live process: its parent and the clock tick since boot at which it started."""

    def __init__(self, parent: int, started: int) -> None:
        """Wraps what the kernel says."""
        self.parent, self.started = parent, started


def harden() -> None:
    """Closes this process to tracing and reading by others of its user, and to set-uid."""
    _prctl(_SET_NO_NEW_PRIVS, 1)
    _prctl(_SET_DUMPABLE, 0)


def become_subreaper() -> None:
    """From now on orphans among the descendants become children of this process."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


class _Program(ctypes.Structure):
    """What the kernel takes a filter by."""

    _fields_ = (("steps", ctypes.c_ushort), ("code", ctypes.c_char_p))


def restrict(code: bytes) -> None:
    """Lets this process and all that it starts make only the system calls that a BPF lets pass."""
    _prctl(_SET_NO_NEW_PRIVS, 1)
    program = _Program(len(code) // 8, code)
    _prctl(_SET_SECCOMP, _FILTER, ctypes.addressof(program))


def _prctl(option: int, value: int, more: int = 0) -> None:
    if _LIBC.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(more), 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def table() -> dict[int, Process]:
    """Every live process by id."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                with open(f"/proc/{name}/stat", "rb") as file:
                    # The command name may hold spaces and brackets; what follows it does not.
                    fields = file.read().rpartition(b")")[2].split()
                if fields[0] not in (b"Z", b"X"):
                    found[int(name)] = Process(int(fields[1]), int(fields[19]))
    return found


def below(roots: Iterable[int], processes: dict[int, Process]) -> set[int]:
    """The descendants of processes."""
    children: dict[int, list[int]] = {}
    for pid, process in processes.items():
        children.setdefault(process.parent, []).append(pid)
    found: set[int] = set()
    fresh = list(roots)
    while fresh:
        for child in children.get(fresh.pop(), ()):
            if child not in found:
                found.add(child)
                fresh.append(child)
    return found


def kill(find: Callable[[], set[int]]) -> bool:
    """Kills what `find` finds; whether there was anything.

    All are stopped before the first is killed: a fork bomb refills every slot that a death frees.
    """
    stopped: set[int] = set()
    for _ in range(_ROUNDS):
        fresh = find() - stopped
        if not fresh:
            break
        _signal(fresh, signal.SIGSTOP)
        stopped |= fresh
    _signal(stopped, signal.SIGKILL)
    return bool(stopped)


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
