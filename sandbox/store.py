"""What a service must not forget: its sandboxes, and a log of what was done in them.

One SQLite file a state directory, shared by the services of that directory. In WAL mode a change
is kept whole or not at all if its service is killed; nothing waits for the disk, for a machine
that loses power loses its sandboxes, too.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sandbox.api import Event, SandboxInfo, parse, to_json
from sandbox.errors import SandboxRefused, SandboxUnavailable
from sandbox.owner import Record
from sandbox.spec import Gates

_VERSION = 1
_SCHEMA = f"""
CREATE TABLE sandboxes (
    box TEXT PRIMARY KEY, info TEXT NOT NULL, pid INTEGER, started TEXT, uid INTEGER
) WITHOUT ROWID;
CREATE TABLE waiting (box TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL, sandbox TEXT NOT NULL, kind TEXT NOT NULL, facts TEXT NOT NULL
);
CREATE INDEX events_of_a_sandbox ON events (sandbox, number);
PRAGMA user_version = {_VERSION};
"""

# Of later than the first version; an earlier service of the directory does without.
_LATER = (
    """CREATE TABLE IF NOT EXISTS gates (
        sandbox TEXT PRIMARY KEY, gates TEXT NOT NULL, taken TEXT NOT NULL, ended INTEGER NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS lifetimes (
        box TEXT PRIMARY KEY, ends REAL NOT NULL
    ) WITHOUT ROWID""",
)

# Events kept of a state directory, and how many more come before the oldest are dropped.
_KEPT, _SLACK = 50_000, 1_000

# Characters kept of a command or a path.
_MAX_TEXT = 2_000

_BUSY_S = 10.0


class Store:
    """The records and the log of a state directory, for one thread."""

    def __init__(self, path: Path, *, kept: int = _KEPT) -> None:
        """Opens or makes the file, readable by this user alone.

        Args:
            path: The file, or ":memory:".
            kept: Events that pruning leaves.

        Raises:
            SandboxUnavailable: it cannot be opened, or is not such a file.
        """
        self.path = path
        self._kept, self._appended = kept, 0
        self.directory = path.parent
        self._to_forget: set[str] = set()
        try:
            if str(path) != ":memory:":
                _make_private(path)
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            self._write_ahead()
            self._db.execute("PRAGMA synchronous = NORMAL")
            with self._transaction():
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                for statement in _LATER:
                    self._db.execute(statement)
        except (OSError, sqlite3.Error) as error:
            raise SandboxUnavailable(
                f"the store {path} cannot be used: {error}; "
                "remove it once no sandbox of it lives, or choose another --state-dir."
            ) from None
        if version not in (0, _VERSION):
            raise SandboxUnavailable(
                f"the store {path} is of another version of the service; "
                "choose another --state-dir."
            )
        self.prune()

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def write(self, box: str, record: Record) -> None:
        """Replaces what is known of a sandbox, by the name of its directory."""
        info = json.dumps(to_json(record.info))
        self._execute(
            "INSERT OR REPLACE INTO sandboxes VALUES (?, ?, ?, ?, ?)",
            (box, info, record.pid, record.started, record.uid),
        )
        self._execute("INSERT OR IGNORE INTO lifetimes VALUES (?, ?)", (box, _ends(record.info)))

    def read(self, box: str) -> Record | None:
        """What is known of a sandbox; None if its making had not come so far."""
        row = self._execute(
            "SELECT info, pid, started, uid FROM sandboxes WHERE box = ?", (box,)
        ).fetchone()
        if row is None:
            return None
        try:
            return Record(parse(SandboxInfo, row[0]), *row[1:])
        except SandboxRefused:
            return None  # Of a version with other fields.

    def forget(self, box: str) -> None:
        """Drops what is known of a sandbox that has ended; what fails is done with the next."""
        self._to_forget.add(box)
        with self._transaction():
            for each in self._to_forget:
                self._execute(
                    # Not those of another that has taken the place of one that waited.
                    "DELETE FROM gates WHERE sandbox = "
                    "(SELECT json_extract(info, '$.id') FROM sandboxes WHERE box = ?) "
                    "AND NOT EXISTS (SELECT 1 FROM sandboxes "
                    "WHERE box != ? AND json_extract(info, '$.id') = gates.sandbox)",
                    (each, each),
                )
                for table in ("sandboxes", "waiting", "lifetimes"):
                    self._execute(f"DELETE FROM {table} WHERE box = ?", (each,))
        self._to_forget.clear()

    def expect(self, box: str) -> None:
        """Notes, before it is made, that a sandbox is made for nobody yet."""
        self._execute("INSERT INTO waiting VALUES (?)", (box,))

    def is_waiting(self, box: str) -> bool:
        """Whether a sandbox was made for nobody yet."""
        found = self._execute("SELECT 1 FROM waiting WHERE box = ?", (box,)).fetchone()
        return found is not None

    def assign(self, box: str, info: SandboxInfo) -> None:
        """Gives a waiting sandbox to a caller."""
        with self._transaction():
            self._execute("DELETE FROM waiting WHERE box = ?", (box,))
            self._execute("INSERT OR REPLACE INTO lifetimes VALUES (?, ?)", (box, _ends(info)))
            self._execute(
                "UPDATE sandboxes SET info = ? WHERE box = ?", (json.dumps(to_json(info)), box)
            )

    def left_s(self, info: SandboxInfo) -> float:
        """Seconds until a sandbox expires, whatever has happened to the time of day."""
        row = self._execute(
            "SELECT ends FROM lifetimes JOIN sandboxes USING (box) "
            "WHERE json_extract(info, '$.id') = ?",
            (info.id,),
        ).fetchone()
        # Of an earlier service that had the time of day alone.
        left_s = row[0] - time.monotonic() if row else info.expires_at - time.time()
        return min(max(0.0, left_s), info.spec.lifetime_s)

    def begin(self, sandbox_id: str) -> None:
        """Notes that a caller's sandbox is not whole yet; as one that waits, it is not adopted."""
        self._execute(
            "INSERT OR IGNORE INTO waiting SELECT box FROM sandboxes "
            "WHERE json_extract(info, '$.id') = ?",
            (sandbox_id,),
        )

    def finish(self, sandbox_id: str) -> None:
        """Notes that a caller's sandbox is whole."""
        self._execute(
            "DELETE FROM waiting WHERE box IN "
            "(SELECT box FROM sandboxes WHERE json_extract(info, '$.id') = ?)",
            (sandbox_id,),
        )

    def update(self, info: SandboxInfo) -> None:
        """Replaces what callers see of a sandbox."""
        self._execute(
            "UPDATE sandboxes SET info = ? WHERE json_extract(info, '$.id') = ?",
            (json.dumps(to_json(info)), info.id),
        )

    def arm(self, sandbox_id: str, gates: Gates) -> None:
        """Notes a sandbox's gates, of which nothing is taken yet."""
        text = json.dumps(to_json(gates))
        self._execute("INSERT INTO gates VALUES (?, ?, '[]', FALSE)", (sandbox_id, text))

    def gates(self, sandbox_id: str) -> tuple[Gates, set[int], bool] | None:
        """A sandbox's gates, the numbers of what is taken, and whether its work has ended."""
        row = self._execute(
            "SELECT gates, taken, ended FROM gates WHERE sandbox = ?", (sandbox_id,)
        ).fetchone()
        return row and (parse(Gates, row[0]), set(json.loads(row[1])), bool(row[2]))

    def note_taken(self, sandbox_id: str, parts: Iterable[int]) -> None:
        """Replaces the numbers of what is taken."""
        text = json.dumps(sorted(parts))
        self._execute("UPDATE gates SET taken = ? WHERE sandbox = ?", (text, sandbox_id))

    def note_end(self, sandbox_id: str) -> None:
        """Notes that a sandbox's work has ended."""
        self._execute("UPDATE gates SET ended = TRUE WHERE sandbox = ?", (sandbox_id,))

    def log(self, sandbox_id: str, kind: str, **facts: Any) -> None:
        """Appends an event; long texts are cut."""
        for name, fact in facts.items():
            if isinstance(fact, str) and len(fact) > _MAX_TEXT:
                facts[name] = f"{fact[:_MAX_TEXT]}... ({len(fact)} characters)"
        self._execute(
            "INSERT INTO events (at, sandbox, kind, facts) VALUES (?, ?, ?, ?)",
            (time.time(), sandbox_id, kind, json.dumps(facts)),
        )
        self._appended += 1
        if self._appended >= _SLACK:
            self.prune()

    def events(self, sandbox_id: str, *, after: int, limit: int) -> list[Event]:
        """The first events of a sandbox that come after one with number `after`."""
        rows = self._execute(
            "SELECT number, at, kind, facts FROM events WHERE sandbox = ? AND number > ? "
            "ORDER BY number LIMIT ?",
            (sandbox_id, after, limit),
        )
        return [Event(number, at, kind, json.loads(facts)) for number, at, kind, facts in rows]

    def prune(self) -> None:
        """Drops all but the latest events."""
        self._appended = 0
        self._execute(
            "DELETE FROM events WHERE number <= (SELECT max(number) FROM events) - ?",
            (self._kept,),
        )

    def _write_ahead(self) -> None:
        """Switches the file to a write-ahead log, unless somebody has.

        While another process writes, SQLite refuses that at once whatever the timeout.
        """
        deadline = time.monotonic() + _BUSY_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
            self._execute("COMMIT")
        except BaseException:
            # A full disk makes SQLite do so itself.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Runs a statement.

        Raises:
            SandboxUnavailable: the file cannot be read or written now.
        """
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise SandboxUnavailable(
                f"the sandbox host fails: its store answers that {error}; "
                "free space on the disk of its state directory, or look at the service's log."
            ) from error


def _ends(info: SandboxInfo) -> float:
    """When a lifetime that begins now is over, by the clock that nobody sets.

    It is the host's, not a process's: the next service reads the same.
    """
    return time.monotonic() + info.spec.lifetime_s


def _make_private(path: Path) -> None:
    """Makes an empty file that this user alone may read, unless there is one.

    The file itself is never opened here: closing it would free all locks that other connections of
    this process hold on it (https://sqlite.org/howtocorrupt.html, 2.2).
    """
    if path.exists():
        return
    empty = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(empty, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with suppress(FileExistsError):
        os.link(empty, path)
    empty.unlink()
