"""The rollout queue in one SQLite file: the default, for workers on one host.

Write-ahead logging with synchronous=NORMAL: a killed process loses nothing that an operation
returned for; a power cut may lose the last operations but never damages the file. The file must lie
on a local disk, because SQLite's locks do not hold on network file systems.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from klong_jax.core.errors import UserError
from klong_jax.core.rollout import Judgement, RolloutRequest
from klong_jax.core.trajectory import Trajectory
from klong_jax.rollout.queue import RolloutResult, State, check_finish, given_up

# "klng": marks the file as ours, so that nobody's other database is written to.
_APPLICATION_ID = 0x6B6C6E67
_VERSION = 1
_BUSY_S = 60.0

_SCHEMA = f"""
CREATE TABLE requests (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id TEXT NOT NULL UNIQUE,
    group_id TEXT NOT NULL,
    priority INTEGER NOT NULL,
    body TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT '{State.QUEUED}',
    attempt INTEGER NOT NULL,
    resume_ref TEXT NOT NULL,
    failures INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    worker TEXT NOT NULL DEFAULT '',
    lease_until REAL NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX by_turn ON requests (state, priority DESC, seq);
CREATE INDEX by_group ON requests (group_id);
-- Apart from the requests: a trajectory is megabytes, and leasing scans the requests.
CREATE TABLE results (
    request_id TEXT PRIMARY KEY REFERENCES requests (request_id),
    attempt INTEGER NOT NULL,
    trajectory TEXT NOT NULL,
    judgement TEXT NOT NULL
) STRICT;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
"""

# One failure more: the next attempt, or the end. `failures` in SET is the value before.
_FAIL = f"""
UPDATE requests SET
    state = iif(failures + 1 < :max_attempts, '{State.QUEUED}', '{State.FAILED}'),
    attempt = attempt + (failures + 1 < :max_attempts),
    failures = failures + 1,
    reason = :reason || iif(:expired, worker, ''),
    worker = ''
WHERE state = '{State.LEASED}'
"""

_LEASE = f"""
UPDATE requests SET state = '{State.LEASED}', worker = :worker, lease_until = :until
WHERE seq IN (
    SELECT seq FROM requests WHERE state = '{State.QUEUED}'
    ORDER BY priority DESC, seq LIMIT :limit
)
RETURNING body, attempt, resume_ref, priority, seq
"""

_SAID: dict[int, str] = {
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; give a file in an existing, writable folder",
    sqlite3.SQLITE_READONLY: "is read-only; make it and its folder writable or choose another",
    sqlite3.SQLITE_FULL: "the disk is full; free space and run the same command again",
    sqlite3.SQLITE_IOERR: "the disk refuses to read or write; free space or choose another disk",
    sqlite3.SQLITE_NOTADB: "is not an SQLite file; choose another path for the queue",
    sqlite3.SQLITE_CORRUPT: "is damaged; restore it from a copy or start a fresh run",
    sqlite3.SQLITE_BUSY: f"another process kept it locked for {_BUSY_S:.0f} s; end that process",
    sqlite3.SQLITE_PERM: "may not be accessed; change its permissions or choose another path",
}


class SqliteQueue:
    """A `RolloutQueue` in a file; any number of processes may open it.

    Args:
        path: The file, created if missing in a folder that exists.
        max_attempts: Infrastructure failures after which a request is given up.

    Raises:
        UserError: The path is no place for a queue, or holds something else.
    """

    def __init__(self, path: Path, max_attempts: int = 3) -> None:
        self.path = path
        self.max_attempts = max_attempts
        # One connection, one thread at a time: callers hand operations to thread pools.
        self._lock = threading.Lock()
        with self._errors():
            self._db = sqlite3.connect(
                path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
        try:
            with self._transaction() as db:
                self._create_or_check(db)
            with self._errors():
                self._write_ahead()
                self._db.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            self._db.close()
            raise

    def _write_ahead(self) -> None:
        """Switches the file to a write-ahead log, unless somebody has.

        The switch turns a read lock into an exclusive one. While another process writes, SQLite
        refuses that at once whatever the timeout: two that upgrade would wait for each other.
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

    def _create_or_check(self, db: sqlite3.Connection) -> None:
        (mark,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:
            # Not executescript: it would commit first, and two creators must not meet.
            for statement in _SCHEMA.split(";\n"):
                db.execute(statement)
        elif mark != _APPLICATION_ID:
            raise UserError(
                f"{self.path}: is an SQLite file but not a rollout queue; choose another path."
            )
        elif version != _VERSION:
            raise UserError(
                f"{self.path}: is a rollout queue of version {version}, this program writes "
                f"version {_VERSION}; start a fresh run."
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            # The low byte is the primary code; the rest says where in SQLite it arose.
            said = _SAID.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
            if said is None:
                raise
            raise UserError(f"{self.path}: {said}.") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                # A full disk rolls back by itself.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def put(self, requests: Sequence[RolloutRequest]) -> int:
        """Adds the requests whose ids are new."""
        with self._transaction() as db:
            return db.executemany(
                "INSERT INTO requests (request_id, group_id, priority, body, attempt, resume_ref)"
                " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (request_id) DO NOTHING",
                [
                    (r.request_id, r.group_id, r.priority, _dump(r), r.attempt, r.resume_ref)
                    for r in requests
                ],
            ).rowcount

    def lease(
        self, worker: str, now_s: float, lease_s: float, limit: int = 1
    ) -> list[RolloutRequest]:
        """Gives up to `limit` requests to a worker."""
        with self._transaction() as db:
            db.execute(
                f"{_FAIL} AND lease_until <= :now",
                {
                    "max_attempts": self.max_attempts,
                    "reason": "the lease ran out, held by worker ",
                    "expired": True,
                    "now": now_s,
                },
            )
            rows = db.execute(
                _LEASE, {"worker": worker, "until": now_s + lease_s, "limit": limit}
            ).fetchall()
        rows.sort(key=lambda row: (-row[3], row[4]))
        return [_request(*row[:3]) for row in rows]

    def renew(
        self, worker: str, request_id: str, attempt: int, now_s: float, lease_s: float
    ) -> bool:
        """Extends a lease."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE requests SET lease_until = ? "
                "WHERE request_id = ? AND attempt = ? AND worker = ? AND state = ?",
                (now_s + lease_s, request_id, attempt, worker, State.LEASED),
            ).rowcount
        return changed > 0

    def finish(self, trajectory: Trajectory, request: RolloutRequest, judgement: Judgement) -> bool:
        """Stores a result if it is the request's first."""
        check_finish(trajectory, request, judgement)
        # Encoded before the transaction: megabytes take a while, and others wait for the lock.
        documents = (_dump(trajectory), _dump(judgement))
        with self._transaction() as db:
            row = db.execute(
                "SELECT state, requests.attempt, results.attempt "
                "FROM requests LEFT JOIN results USING (request_id) WHERE request_id = ?",
                (request.request_id,),
            ).fetchone()
            if row is None or request.attempt > row[1]:
                raise ValueError(f"{request.trajectory_id} was never leased from {self.path}")
            if row[0] in (State.FINISHED, State.FAILED):
                return bool(row[2] == request.attempt)
            db.execute(
                "UPDATE requests SET state = ?, worker = '' WHERE request_id = ?",
                (State.FINISHED, request.request_id),
            )
            db.execute(
                "INSERT INTO results VALUES (?, ?, ?, ?)",
                (request.request_id, request.attempt, *documents),
            )
        return True

    def release(self, request: RolloutRequest) -> bool:
        """Gives a request back, attempt unchanged."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE requests SET state = ?, worker = '', resume_ref = ? "
                "WHERE request_id = ? AND attempt = ? AND state = ?",
                (
                    State.QUEUED,
                    request.resume_ref,
                    request.request_id,
                    request.attempt,
                    State.LEASED,
                ),
            ).rowcount
        return changed > 0

    def fail(self, request: RolloutRequest, reason: str) -> bool:
        """Reports that the infrastructure failed."""
        with self._transaction() as db:
            changed = db.execute(
                f"{_FAIL} AND request_id = :request_id AND attempt = :attempt",
                {
                    "max_attempts": self.max_attempts,
                    "reason": reason,
                    "expired": False,
                    "request_id": request.request_id,
                    "attempt": request.attempt,
                },
            ).rowcount
        return changed > 0

    def results(self, group_ids: Collection[str]) -> list[RolloutResult]:
        """The results so far of these groups, in put order."""
        with self._lock, self._errors():
            rows = self._db.execute(
                "SELECT body, coalesce(results.attempt, requests.attempt), resume_ref, reason, "
                "trajectory, judgement "
                "FROM requests LEFT JOIN results USING (request_id) "
                "WHERE state IN (?, ?) AND group_id IN (SELECT value FROM json_each(?)) "
                "ORDER BY seq",
                (State.FINISHED, State.FAILED, json.dumps(list(group_ids))),
            ).fetchall()
        return [
            given_up(_request(*row[:3]), row[3])
            if row[4] is None
            else RolloutResult(
                _request(*row[:3]),
                Trajectory.from_json(json.loads(row[4])),
                Judgement.from_json(json.loads(row[5])),
            )
            for row in rows
        ]

    def counts(self, group_ids: Collection[str] | None = None) -> Mapping[State, int]:
        """How many requests stand in each state."""
        chosen = None if group_ids is None else json.dumps(list(group_ids))
        with self._lock, self._errors():
            rows = self._db.execute(
                "SELECT state, count(*) FROM requests WHERE :chosen IS NULL "
                "OR group_id IN (SELECT value FROM json_each(:chosen)) GROUP BY state",
                {"chosen": chosen},
            ).fetchall()
        return dict.fromkeys(State, 0) | {State(state): count for state, count in rows}

    def recover(self, live_workers: Collection[str]) -> int:
        """Takes back the leases of all other workers."""
        with self._transaction() as db:
            return db.execute(
                "UPDATE requests SET state = ?, attempt = attempt + 1, worker = '' "
                "WHERE state = ? AND worker NOT IN (SELECT value FROM json_each(?))",
                (State.QUEUED, State.LEASED, json.dumps(list(live_workers))),
            ).rowcount

    def close(self) -> None:
        """Lets go of the file."""
        with self._lock:
            self._db.close()


def _dump(noun: RolloutRequest | Trajectory | Judgement) -> str:
    # ASCII: a tool may have said half a surrogate pair, which UTF-8 cannot hold.
    return json.dumps(noun.to_json())


def _request(body: str, attempt: int, resume_ref: str) -> RolloutRequest:
    fields: dict[str, Any] = json.loads(body)
    return RolloutRequest(**{**fields, "attempt": attempt, "resume_ref": resume_ref})
