"""Metrics as JSON lines: one a step, rewritten from the last checkpoint on after a restart.

Of several processes the first writes for all.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import write_text
from klong_jax.parallel.distributed import is_first
from klong_jax.training.trackers import Tracker, TrackerName, open_trackers


class MetricsLog:
    """Appends rows that carry a `step`."""

    def __init__(self, path: Path, resume_step: int, trackers: Sequence[TrackerName] = ()) -> None:
        """Opens the log; rows of steps after `resume_step` will be written again, so they go.

        Args:
            path: The file; trackers keep what they have beside it.
            resume_step: The last step that is not taken again.
            trackers: Where else rows are shown.

        Raises:
            UserError: The library of a tracker is not installed.
        """
        self.path = path
        self._trackers: list[Tracker] = []
        if not is_first():
            return
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._trackers = open_trackers(trackers, path.parent)
        for row in kept:
            self._show(row)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row and hands it to the operating system.

        Raises:
            UserError: The disk refuses.
        """
        if not is_first():
            return
        try:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); free space and run again."
            ) from None
        self._show(row)

    def close(self) -> None:
        """Hands over what trackers still hold."""
        for tracker in self._trackers:
            tracker.close()

    def _show(self, row: dict[str, Any]) -> None:
        numbers = {
            name: float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step"
        }
        for tracker in self._trackers:
            tracker.write(row["step"], numbers)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete rows; a last line torn by a crash is passed over."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
