"""One contract, every backend: examples, real deaths, and bad places."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from uuid import uuid4

import pytest
from queue_helpers import (
    MAX_ATTEMPTS,
    finish,
    free_port,
    judgement_of,
    request,
    trajectory_of,
    unavailable,
)

from klong_jax.core.errors import UserError
from klong_jax.core.rollout import Verdict
from klong_jax.core.trajectory import Status
from klong_jax.rollout import open_queue
from klong_jax.rollout.queue import RolloutQueue, State
from klong_jax.rollout.sqlite_queue import SqliteQueue

Opener = Callable[[], RolloutQueue]


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens the same queue again and again."""
    if request.param == "sqlite":
        url = str(tmp_path / "queue.sqlite")
    else:
        url = request.getfixturevalue("redis_url")
    namespace = uuid4().hex
    return lambda: open_queue(url, namespace, MAX_ATTEMPTS)


@pytest.fixture
def queue(opener: Opener) -> Iterator[RolloutQueue]:
    opened = opener()
    yield opened
    opened.close()


def test_put_is_idempotent_even_when_finished(queue: RolloutQueue) -> None:
    assert queue.put([request("a"), request("b"), request("a")]) == 2
    assert queue.put([replace(request("a"), priority=9), request("c")]) == 1
    (first,) = queue.lease("w", 0, 10)
    assert first == request("a")
    assert finish(queue, first)
    assert queue.put([request("a")]) == 0
    assert queue.counts() == {
        State.QUEUED: 2,
        State.LEASED: 0,
        State.FINISHED: 1,
        State.FAILED: 0,
    }


def test_lease_by_priority_then_put_order(queue: RolloutQueue) -> None:
    queue.put([request("low", priority=-1), request("x1"), request("x2")])
    queue.put([request("high", priority=5), request("x3")])
    names = [r.request_id for r in queue.lease("w", 0, 10, limit=2)]
    names += [r.request_id for r in queue.lease("v", 0, 10, limit=9)]
    assert names == ["high", "x1", "x2", "x3", "low"]
    assert queue.lease("w", 9.9, 10) == []


def test_an_expired_lease_returns_as_the_next_attempt(queue: RolloutQueue) -> None:
    queue.put([request("a")])
    (first,) = queue.lease("w", 0, 10)
    assert queue.renew("w", "a", 0, now_s=9, lease_s=10)
    assert queue.lease("v", 18.9, 10) == []
    (second,) = queue.lease("v", 19, 10)
    assert second == replace(first, attempt=1)
    assert not queue.renew("w", "a", 0, 19, 10)
    assert not queue.renew("w", "a", 1, 19, 10)
    assert not queue.release(first)
    assert not queue.fail(first, "late")


def test_the_first_finished_attempt_counts(queue: RolloutQueue) -> None:
    queue.put([request("a")])
    (first,) = queue.lease("w", 0, 10)
    (second,) = queue.lease("v", 10, 10)
    assert finish(queue, first)
    assert not finish(queue, second)
    assert not queue.finish(trajectory_of(second), second, judgement_of(second, 0.9))
    assert finish(queue, first), "finishing again is the same answer"
    (result,) = queue.results(["g"])
    assert (result.request, result.trajectory, result.judgement) == (
        first,
        trajectory_of(first),
        judgement_of(first),
    )
    assert queue.lease("w", 100, 10) == []
    assert not queue.fail(second, "too late")


def test_a_requeued_attempt_may_still_finish(queue: RolloutQueue) -> None:
    queue.put([request("a"), request("b", priority=1)])
    first, second = queue.lease("w", 0, 10, limit=2)
    assert queue.recover([]) == 2
    assert finish(queue, second)
    assert [r.request_id for r in queue.lease("v", 1, 10, limit=5)] == [first.request_id]


def test_release_keeps_attempt_and_resume_point(queue: RolloutQueue) -> None:
    queue.put([request("a")])
    for _ in range(MAX_ATTEMPTS + 1):
        (leased,) = queue.lease("w", 0, 10)
        assert queue.release(replace(leased, resume_ref="a.0@12"))
    assert queue.lease("w", 0, 10) == [replace(request("a"), resume_ref="a.0@12")]


def test_failures_end_in_a_result_that_closes_the_group(queue: RolloutQueue) -> None:
    queue.put([request("a"), request("b")])
    for attempt in range(MAX_ATTEMPTS):
        (leased,) = queue.lease("w", attempt, 10)
        assert (leased.request_id, leased.attempt) == ("a", attempt)
        assert queue.fail(leased, f"sandbox lost {attempt}")
        assert not queue.fail(leased, "said twice")
    (result,) = queue.results(["g"])
    assert result.request == leased
    assert result.trajectory.trajectory_id == "a.2"
    assert result.trajectory.status is Status.INFRA_FAILED
    assert result.judgement.status is Verdict.FAILED
    assert result.judgement.score is None
    assert result.judgement.reason == "sandbox lost 2"
    assert not finish(queue, leased), "a group that closed does not change"
    assert queue.counts()[State.FAILED] == 1


def test_leases_that_run_out_end_too(queue: RolloutQueue) -> None:
    queue.put([request("a")])
    for attempt in range(MAX_ATTEMPTS):
        assert len(queue.lease(f"w{attempt}", attempt * 10, 10)) == 1
    assert queue.lease("w", 1000, 10) == []
    (result,) = queue.results(["g"])
    assert result.judgement.reason == "the lease ran out, held by worker w2"


def test_recover_takes_the_leases_of_the_dead_only(queue: RolloutQueue) -> None:
    queue.put([request(name) for name in "abc"])
    queue.lease("dead", 0, 1e9, limit=2)
    (alive,) = queue.lease("alive", 0, 1e9)
    assert queue.recover(["alive", "other"]) == 2
    assert queue.renew("alive", alive.request_id, 0, 1, 10)
    again = queue.lease("w", 1, 10, limit=9)
    assert [(r.request_id, r.attempt) for r in again] == [("a", 1), ("b", 1)]
    for _ in range(2 * MAX_ATTEMPTS):
        queue.recover([])
        assert len(queue.lease("w", 1, 10, limit=9)) == 3, "a restart is not a failure"


def test_groups_are_explicit(queue: RolloutQueue) -> None:
    queue.put([request("a", "g1"), request("b", "g2"), request("c", "g1")])
    for leased in reversed(queue.lease("w", 0, 10, limit=3)):
        finish(queue, leased)
    assert [r.request.request_id for r in queue.results(["g1"])] == ["a", "c"]
    assert [r.request.request_id for r in queue.results(["g2", "g1", "g2"])] == ["a", "b", "c"]
    assert queue.results([]) == queue.results(["unknown"]) == []
    assert queue.counts(["g1"])[State.FINISHED] == 2
    assert sum(queue.counts([]).values()) == 0


def test_what_does_not_belong_is_refused(queue: RolloutQueue) -> None:
    queue.put([request("a")])
    (leased,) = queue.lease("w", 0, 10)
    with pytest.raises(ValueError, match=r"release or fail"):
        queue.finish(trajectory_of(leased, Status.SUSPENDED), leased, judgement_of(leased))
    with pytest.raises(ValueError, match=r"does not belong to a\.0"):
        queue.finish(trajectory_of(request("b")), leased, judgement_of(leased))
    with pytest.raises(ValueError, match=r"never leased"):
        finish(queue, replace(leased, attempt=1))
    with pytest.raises(ValueError, match=r"never leased"):
        finish(queue, request("b"))


def test_two_handles_see_one_queue(opener: Opener) -> None:
    first, second = opener(), opener()
    first.put([request("a")])
    (leased,) = second.lease("w", 0, 10)
    second.close()
    assert finish(first, leased)
    assert len(opener().results(["g"])) == 1


def test_threads_share_a_handle(queue: RolloutQueue) -> None:
    queue.put([request(f"r{i}") for i in range(60)])

    def work(worker: int) -> int:
        done = 0
        while leased := queue.lease(f"w{worker}", 0, 10):
            done += finish(queue, leased[0])
        return done

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(6))) == 60
    assert queue.counts()[State.FINISHED] == 60


def _drain(path: str, worker: int) -> list[str]:
    queue = open_queue(path, "", MAX_ATTEMPTS)
    queue.put([request(f"r{i}") for i in range(40)])
    done = []
    while leased := queue.lease(f"w{worker}", 0, 10):
        assert finish(queue, leased[0])
        done.append(leased[0].request_id)
    return done


def test_processes_create_and_drain_one_file(tmp_path: Path) -> None:
    path = str(tmp_path / "queue.sqlite")
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        done = list(pool.map(_drain, [path] * 4, range(4)))
    assert sorted(chain.from_iterable(done)) == sorted(f"r{i}" for i in range(40))


def test_a_file_that_another_writes_gets_its_log_when_that_is_done(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite"
    queue = SqliteQueue(path)
    # As creators that meet find it: with the tables, not yet with the log, locked by one of them.
    queue._db.execute("PRAGMA journal_mode = DELETE")
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            queue._db.execute("PRAGMA journal_mode = WAL")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: (time.sleep(0.1), other.execute("COMMIT")))
            queue._write_ahead()
    assert queue._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# --- death ---------------------------------------------------------------------------------------

WORKER = """
import sys
import time
from queue_helpers import finish
from klong_jax.rollout import open_queue
path, worker = sys.argv[1:]
queue = open_queue(path, "", 3)
while leased := queue.lease(worker, 0.0, 1e9, limit=2):
    for asked in leased:
        print("holds", asked.trajectory_id, flush=True)
        if finish(queue, asked):
            print("finished", asked.trajectory_id, flush=True)
"""


def start_worker(path: Path, name: str) -> subprocess.Popen[str]:
    here = Path(__file__).resolve()
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path), name],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{here.parent}:{here.parents[2]}"},
    )


@pytest.mark.slow
def test_kill_9_loses_nothing_and_finishes_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite"
    queue = open_queue(str(path), "", MAX_ATTEMPTS)
    asked = [request(f"r{i}", group=f"g{i % 10}") for i in range(400)]
    queue.put(asked)
    dice = random.Random(0)
    said: list[str] = []
    for death in range(8):
        victim = start_worker(path, f"w{death}")
        assert victim.stdout is not None
        # How much it may say before it dies is random, and so is what it is doing by then.
        said += [victim.stdout.readline() for _ in range(dice.randrange(1, 40))]
        victim.send_signal(signal.SIGKILL)
        said += victim.stdout.readlines()
        victim.wait()
        queue.recover([])
    survivor = start_worker(path, "survivor")
    said += survivor.communicate()[0].splitlines(keepends=True)
    assert survivor.returncode == 0

    finished = [line.split()[1] for line in said if line.startswith("finished") and "\n" in line]
    results = queue.results([f"g{i}" for i in range(10)])
    stored = [result.trajectory.trajectory_id for result in results]
    assert [result.request.request_id for result in results] == [r.request_id for r in asked]
    assert len({name.rpartition(".")[0] for name in finished}) == len(finished)
    assert set(finished) <= set(stored)
    assert any(result.request.attempt for result in results), "no death hit a lease"
    assert len(finished) >= 400 - 8, "each death may hide one finish at most"


# --- bad places ----------------------------------------------------------------------------------


def sentence(path: Path | str, namespace: str = "") -> str:
    with pytest.raises(UserError) as caught:
        open_queue(str(path), namespace)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_paths_that_are_no_place_for_a_queue(tmp_path: Path) -> None:
    assert "existing, writable folder" in sentence(tmp_path / "missing" / "queue.sqlite")
    assert "existing, writable folder" in sentence(tmp_path)
    notes = tmp_path / "notes.txt"
    notes.write_text("not a database, but long enough to have a header" * 10)
    assert "is not an SQLite file" in sentence(notes)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    before = other.read_bytes()
    assert "not a rollout queue" in sentence(other)
    assert other.read_bytes() == before
    newer = tmp_path / "newer.sqlite"
    open_queue(str(newer), "").close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    assert "version 99" in sentence(newer)


def test_a_server_that_does_not_answer_is_one_sentence() -> None:
    said = sentence(f"redis://user:secret@127.0.0.1:{free_port()}/0")
    assert "no Redis server answers" in said
    assert "secret" not in said
    assert "not a Redis URL" in sentence("redis://127.0.0.1:port/0")


FILLER = """
import sys
import time
from queue_helpers import request
from klong_jax.core.errors import UserError
from klong_jax.rollout import open_queue
try:
    queue = open_queue(sys.argv[1], "")
    for i in range(100_000):
        queue.put([request(f"{i}" * 100)])
except UserError as error:
    print(error)
    if len(sys.argv) > 2:
        print(sum(queue.counts().values()) == i)
"""


def fill(bubblewrap: list[str], path: Path, *more: str) -> list[str]:
    if shutil.which("bwrap") is None:
        unavailable("no bubblewrap on this machine: apt-get install bubblewrap")
    here = Path(__file__).resolve()
    done = subprocess.run(
        ["bwrap", *bubblewrap, sys.executable, "-c", FILLER, str(path), *more],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{here.parent}:{here.parents[2]}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_read_only_disk_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite"
    read_only = ["--dev-bind", "/", "/", "--ro-bind", str(tmp_path), str(tmp_path)]
    (said,) = fill(read_only, path)
    assert str(path) in said and "existing, writable folder" in said
    open_queue(str(path), "").close()
    (said,) = fill(read_only, path)
    assert str(path) in said and "writable" in said


def test_a_full_disk_is_one_sentence_and_keeps_what_was_written(tmp_path: Path) -> None:
    small = ["--dev-bind", "/", "/", "--size", "400000", "--tmpfs", str(tmp_path)]
    said, kept = fill(small, tmp_path / "queue.sqlite", "then count")
    assert "disk is full" in said
    assert kept == "True"
