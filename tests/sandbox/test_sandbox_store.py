"""The store: whole after a kill, shared, bounded, and clear about what it cannot read."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.api import SandboxInfo
from sandbox.errors import SandboxUnavailable
from sandbox.owner import Record
from sandbox.spec import Gates, SandboxSpec
from sandbox.store import Store

INFO = SandboxInfo("sb-00000000", "local", "bubblewrap", 1.0, 2.0, SandboxSpec(labels={"a": "b"}))

_KILLED = """
import os, signal, sys
from pathlib import Path
from sandbox.store import Store
store = Store(Path(sys.argv[1]))
for n in range(500):
    store.log("sb-00000000", "exec", command=str(n))
    print(n, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_written_is_there_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    reader = Store(path)
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path)], capture_output=True)
    told = done.stdout.split()
    assert len(told) == 500 and done.returncode == -9
    for store in (reader, Store(path)):
        events = store.events("sb-00000000", after=0, limit=1000)
        assert [event.facts["command"].encode() for event in events] == told
        seen = store.events("sb-00000000", after=events[9].number, limit=2)
        assert [event.facts["command"] for event in seen] == ["10", "11"]
        assert store.events("sb-11111111", after=0, limit=9) == []


def test_the_end_of_one_that_waited_takes_no_gates_of_who_took_its_place(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.db")
    for box in ("sb-wait", "sb-fresh"):
        store.write(box, Record(INFO, uid=1))
    store.arm(INFO.id, Gates(("read me",)))
    store.forget("sb-wait")
    assert store.gates(INFO.id) == (Gates(("read me",)), set(), False)
    store.forget("sb-fresh")
    assert store.gates(INFO.id) is None


_OPENING = """
import sys, time
from pathlib import Path
from sandbox.store import Store
kept = Store(Path(sys.argv[1]))
end = time.monotonic() + 1
while time.monotonic() < end:
    kept.log("sb-00000000", "exec")
    Store(Path(sys.argv[1])).log("sb-00000000", "exec")
"""


def test_services_of_one_process_leave_each_others_locks(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    command = [sys.executable, "-c", _OPENING, str(path)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [writer.communicate()[1] for writer in writers] == ["", ""]
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["store.db"]
    (whole,) = sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone()
    assert whole == "ok"


def test_records_and_who_waits(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.db")
    record = Record(INFO, pid=7, started="8", uid=9)
    assert store.read("sb-box00000") is None
    store.expect("sb-box00000")
    store.write("sb-box00000", Record(INFO))
    store.write("sb-box00000", record)
    assert store.read("sb-box00000") == record and store.is_waiting("sb-box00000")
    other = SandboxInfo("sb-22222222", "local", "bubblewrap", 3.0, 4.0, SandboxSpec(lifetime_s=1))
    store.assign("sb-box00000", other)
    assert store.read("sb-box00000") == Record(other, 7, "8", 9)
    assert not store.is_waiting("sb-box00000")
    store.forget("sb-box00000")
    assert store.read("sb-box00000") is None


def test_the_log_is_bounded(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.db", kept=10)
    for n in range(2500):
        store.log("sb-00000000", "exec", command=f"{n} " + "x" * 5000)
    kept = store.events("sb-00000000", after=0, limit=9999)
    assert 10 <= len(kept) < 1010 and kept[-1].facts["command"].startswith("2499 x")
    assert all(len(event.facts["command"]) < 2100 for event in kept)
    store.prune()
    assert len(store.events("sb-00000000", after=0, limit=9999)) == 10


def test_a_file_that_is_no_store_is_named_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"not a database, but somebody's" * 100)
    with pytest.raises(SandboxUnavailable, match=f"{path} cannot be used: .*--state-dir"):
        Store(path)
    assert path.read_bytes().startswith(b"not a database, but somebody's")
    newer = sqlite3.connect(tmp_path / "newer.db")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(SandboxUnavailable, match=r"newer\.db is of another version"):
        Store(tmp_path / "newer.db")


def test_others_cannot_read_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.db")
    store.log("sb-00000000", "exec", command="secret")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
