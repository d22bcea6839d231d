"""For how long an agent was frozen, told to it by a file beside its socket.

A frozen process does not see time stop. Its commands are not to run out of theirs meanwhile, and
it must know before the first of its timers can fire: sooner than a frame could tell it, and also
when the service that froze it is gone. So it looks into the file, whenever it asks for the time.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from sandbox.protocol import FROZEN_FILE


class Standstill:
    """The file of one agent, and a second one that says since when it is frozen."""

    def __init__(self, directory: Path) -> None:
        """Makes the file, or reads what an earlier service has left.

        Args:
            directory: Where the agent finds its socket.
        """
        self._path, self._since = directory / FROZEN_FILE, directory / f"{FROZEN_FILE}.since"
        self.began: float | None = None
        if not self._path.exists():
            self._path.write_text(_text(0.0))
            self._path.chmod(0o644)
        self._before = float(self._path.read_text() or 0)
        with suppress(FileNotFoundError):
            # By the kernel's clock, which all processes of the host share.
            began, before = self._since.read_text().split()
            self.began, self._before = float(began), float(before)

    def begin(self) -> None:
        """Notes that the agent will be frozen now."""
        self.began = time.monotonic()
        part = self._since.with_suffix(".part")
        part.write_text(f"{self.began!r} {self._before!r}")
        os.replace(part, self._since)

    def end(self) -> None:
        """Tells the agent, which is frozen still, for how long it was."""
        assert self.began is not None
        self._before += time.monotonic() - self.began
        # In place, for the agent has it open; in one piece, for it may be awake after all.
        with open(self._path, "r+", encoding="ascii") as file:
            file.write(_text(self._before))
        self._since.unlink()
        self.began = None


def _text(seconds: float) -> str:
    return f"{seconds:020.6f}"
