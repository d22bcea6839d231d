"""What sandboxes take of the host now."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from sandbox.agent import processes


@dataclass(frozen=True)
class Usage:
    """Processes of a sandbox and around it, and the bytes of memory that they share fairly."""

    processes: int
    memory_bytes: int


def usage(firsts: Iterable[int], *, minded: bool) -> dict[int, Usage]:
    """The usage of sandboxes, by the id on this host of the first process of each.

    Args:
        firsts: First processes, such as agents.
        minded: Whether the parent of each serves it alone, as bubblewrap's process and a
            container's shim do; it then counts, too.
    """
    table = processes.table()
    found = {}
    for first in firsts:
        members = {first} & table.keys() | processes.below([first], table)
        if minded and first in table:
            members.add(table[first].parent)
        found[first] = Usage(len(members), sum(map(_memory, members)))
    return found


def _memory(pid: int) -> int:
    """Proportional set size, or the resident set of a process that may not be looked into."""
    with suppress(OSError), open(f"/proc/{pid}/smaps_rollup", "rb") as file:
        for line in file:
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
    with suppress(OSError), open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[1]) * 4096
    return 0
