"""What stands between a caller and a sandbox: reading before work, conditions before the end.

Whoever holds an agent's tools may have been talked into anything, so the service asks this of
every request alike: it serves what must be read, and so knows what was; it runs the finish check
itself. Once armed, gates stay, also over a kill of the service.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sandbox.errors import SandboxEnded, SandboxGated, SandboxRefused
from sandbox.spec import Gates
from sandbox.store import Store

# Numbers that a sentence names.
_NAMED = 8


class Gate:
    """The gates of one sandbox; without any it lets everything through."""

    def __init__(self, store: Store, sandbox_id: str) -> None:
        """Takes up what the store knows of the sandbox.

        Texts stay in the store: many sandboxes may have a long paper each.
        """
        self._store, self._id = store, sandbox_id
        gates, taken, ended = store.gates(sandbox_id) or (None, set(), False)
        self._is_armed, self._ended, self._ends = gates is not None, ended, 0
        self._writes = 0
        self._parts = len(gates.reading) if gates else 0
        self._taken: set[int] = taken

    def arm(self, gates: Gates) -> None:
        """Sets the gates, once and for all.

        Raises:
            SandboxRefused: there are others already.
        """
        known = self._store.gates(self._id)
        if known is None:
            self._store.arm(self._id, gates)
            self._is_armed, self._parts = True, len(gates.reading)
        elif known[0] != gates:
            raise SandboxRefused(
                f"sandbox {self._id} has gates already, which stay; make a sandbox for others."
            )

    def take(self, part: int) -> str:
        """A text of the mandatory reading by its number from 1, which is read by that.

        Raises:
            SandboxRefused: there is no such text.
        """
        known = self._store.gates(self._id)
        if known is None or not 1 <= part <= self._parts:
            raise SandboxRefused(f"part {part}: the reading of this sandbox has {self._parts}.")
        if part not in self._taken:
            self._store.note_taken(self._id, self._taken | {part})
            self._taken.add(part)
        return known[0].reading[part - 1]

    def admit_work(self) -> None:
        """Lets work through, or not.

        Raises:
            SandboxEnded: the work has ended.
            SandboxGated: something must be read first, or the end is being checked.
        """
        if self._ended:
            raise SandboxEnded(f"the work in sandbox {self._id} has ended; read its files.")
        if self._ends:
            raise SandboxGated(f"sandbox {self._id} is being ended; wait for what comes of it.")
        self._check_reading()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Lets a transfer of files through as work; until it is over nothing ends."""
        self.admit_work()
        self._writes += 1
        try:
            yield
        finally:
            self._writes -= 1

    def _check_reading(self) -> None:
        unread = [part for part in range(1, self._parts + 1) if part not in self._taken]
        if unread:
            named = ", ".join(map(str, unread[:_NAMED]))
            more = ", ..." if len(unread) > _NAMED else ""
            raise SandboxGated(f"first take the reading of sandbox {self._id}: {named}{more}.")

    @contextlib.contextmanager
    def ending(self) -> Iterator[str | None]:
        """Keeps new work out meanwhile; yields the finish check, None if the end was before.

        Raises:
            SandboxGated: something must be read first, or files are being written.
        """
        self._check_reading()
        if self._writes:
            raise SandboxGated(f"files of sandbox {self._id} are being written; wait for that.")
        self._ends += 1
        try:
            known = self._store.gates(self._id)
            yield None if self._ended else known[0].finish_check if known else ""
        finally:
            self._ends -= 1

    def end(self) -> None:
        """Ends the work for good."""
        if not self._is_armed:
            self.arm(Gates())
        self._store.note_end(self._id)
        self._ended = True
