"""What sandboxes take of the host now."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from sandbox.agent import processes


@dataclass(frozen=True)
class Usage:
    """Processes of a sandbox, its agent's included, and the bytes of memory they share fairly."""

    processes: int
    memory_bytes: int


def usage(agents: Iterable[int]) -> dict[int, Usage]:
    """The usage of sandboxes by their agents' process ids on this host."""
    table = processes.table()
    found = {}
    for agent in agents:
        members = {agent} & table.keys() | processes.below([agent], table)
        found[agent] = Usage(len(members), sum(map(_memory, members)))
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
