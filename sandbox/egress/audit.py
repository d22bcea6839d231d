"""What became of each request: a file of JSON lines a sandbox, and news for the service."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sandbox.egress.policy import Verdict

# Bytes of one sandbox's file, and how many files are kept: a flood of requests fills no disk.
_MAX_BYTES, _MAX_FILES = 16_000_000, 2_000
# Sandboxes that end between two counts of the files.
_PRUNE_EVERY = 100
_PRUNE_EVERY = 100
# Requests of one sandbox that are told to the service one by one; all are counted.
_MAX_TOLD = 500
_MAX_TEXT = 2_000
_PAUSE_S = 0.1


class Audit:
    """The audit of all sandboxes of an engine."""

    def __init__(self, directory: Path, tell: Callable[[dict[str, Any]], None]) -> None:
        """Writes below a directory, which is made.

        Args:
            directory: Where the files are, named by sandbox.
            tell: Sends an object to the service.
        """
        directory.mkdir(mode=0o700, exist_ok=True)
        self._directory, self._tell = directory, tell
        self._told: Counter[str] = Counter()
        self._forgotten = 0
        self._counts: Counter[tuple[str, str]] = Counter()
        self._events: list[dict[str, Any]] = []
        self._flush: asyncio.TimerHandle | None = None
        self._prune()

    def verdict(self, sandbox: str, verdict: Verdict, method: str, url: str) -> None:
        """Notes a verdict."""
        word = "allowed" if verdict.allowed else "refused"
        facts = {
            "verdict": word,
            "reason": verdict.reason,
            "method": method[:20],
            "url": url[:_MAX_TEXT],
        }
        self.note(sandbox, facts)
        self._counts[word, verdict.reason] += 1
        self._told[sandbox] += 1
        if self._told[sandbox] <= _MAX_TOLD:
            self._events.append({"sandbox": sandbox, **facts})
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(_PAUSE_S, self._send)

    def note(self, sandbox: str, facts: dict[str, Any]) -> None:
        """Appends a line to a sandbox's file, if there is room."""
        line = json.dumps({"at": round(time.time(), 3), **facts}) + "\n"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(self._directory / f"{sandbox}.jsonl", flags, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size < _MAX_BYTES:
                full = size + len(line) >= _MAX_BYTES
                os.write(fd, (json.dumps({"full": True}) + "\n" if full else line).encode())
        finally:
            os.close(fd)

    def forget(self, sandbox: str) -> None:
        """Stops counting for a sandbox that is no more; its file stays."""
        self._told.pop(sandbox, None)
        self._forgotten += 1
        if self._forgotten % _PRUNE_EVERY == 0:
            self._prune()

    def _prune(self) -> None:
        files = sorted(self._directory.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in files[:-_MAX_FILES]:
            old.unlink(missing_ok=True)

    def _send(self) -> None:
        self._flush = None
        counts = [[*key, number] for key, number in self._counts.items()]
        self._tell({"counts": counts, "events": self._events})
        self._counts.clear()
        self._events = []
