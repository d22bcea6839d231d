"""Metrics as JSON lines: one a step, rewritten from the last checkpoint on after a restart.

Of several processes the first writes for all.
"""

import json
import os
from pathlib import Path
from typing import Any

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import write_text
from klong_jax.parallel.distributed import is_first


class MetricsLog:
    """Appends rows that carry a `step`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Opens the log; rows of steps after `resume_step` will be written again, so they go."""
        self.path = path
        if not is_first():
            return
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete rows; a last line torn by a crash is passed over."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
