"""Any sequence of operations leaves the queue where a plain dictionary says it should."""

from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from queue_helpers import MAX_ATTEMPTS, finish, request

from klong_jax.core.rollout import RolloutRequest
from klong_jax.rollout import open_queue
from klong_jax.rollout.queue import RolloutQueue, State


@dataclass
class Entry:
    """What the model knows of one request."""

    asked: RolloutRequest
    seq: int
    state: State = State.QUEUED
    failures: int = 0
    worker: str = ""
    until: float = 0.0
    finished: int | None = None
    ever: set[int] = field(default_factory=set)


class QueueMachine(RuleBasedStateMachine):
    """The queue and the dictionary side by side."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.namespace = uuid4().hex
        self.now = 0.0
        self.model: dict[str, Entry] = {}
        self.queue = self.open()

    def open(self) -> RolloutQueue:
        url = self.url or f"sqlite:///{self.folder.name}/queue.sqlite"
        return open_queue(url, self.namespace, MAX_ATTEMPTS)

    def teardown(self) -> None:
        self.queue.close()
        self.folder.cleanup()

    def strike(self, entry: Entry) -> None:
        entry.failures += 1
        entry.worker = ""
        if entry.failures == MAX_ATTEMPTS:
            entry.state = State.FAILED
        else:
            entry.state = State.QUEUED
            entry.asked = replace(entry.asked, attempt=entry.asked.attempt + 1)

    @rule(
        names=st.lists(st.integers(0, 9), max_size=4),
        group=st.sampled_from(["g", "h"]),
        priority=st.integers(-1, 1),
    )
    def put(self, names: list[int], group: str, priority: int) -> None:
        asked = [request(f"r{name}", group, priority) for name in names]
        new = {r.request_id for r in asked} - set(self.model)
        assert self.queue.put(asked) == len(new)
        for r in asked:
            self.model.setdefault(r.request_id, Entry(r, len(self.model)))

    @rule(worker=st.sampled_from("uv"), lease_s=st.integers(1, 5), limit=st.integers(0, 3))
    def lease(self, worker: str, lease_s: int, limit: int) -> None:
        for entry in self.model.values():
            if entry.state is State.LEASED and entry.until <= self.now:
                self.strike(entry)
        waiting = [entry for entry in self.model.values() if entry.state is State.QUEUED]
        waiting.sort(key=lambda entry: (-entry.asked.priority, entry.seq))
        for entry in waiting[:limit]:
            entry.state, entry.worker = State.LEASED, worker
            entry.until = self.now + lease_s
            entry.ever.add(entry.asked.attempt)
        expected = [entry.asked for entry in waiting[:limit]]
        assert self.queue.lease(worker, self.now, lease_s, limit) == expected

    @rule(seconds=st.integers(1, 5))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds

    def pick(self, data: st.DataObject) -> tuple[Entry, RolloutRequest, bool]:
        entry = data.draw(st.sampled_from([e for e in self.model.values() if e.ever]))
        attempt = data.draw(st.sampled_from(sorted(entry.ever)))
        holds = entry.state is State.LEASED and attempt == entry.asked.attempt
        return entry, replace(entry.asked, attempt=attempt), holds

    @precondition(lambda self: any(e.ever for e in self.model.values()))
    @rule(data=st.data(), worker=st.sampled_from("uv"))
    def renew(self, data: st.DataObject, worker: str) -> None:
        entry, asked, holds = self.pick(data)
        holds = holds and entry.worker == worker
        renewed = self.queue.renew(worker, asked.request_id, asked.attempt, self.now, 3)
        assert renewed == holds
        if holds:
            entry.until = self.now + 3

    @precondition(lambda self: any(e.ever for e in self.model.values()))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        entry, asked, _ = self.pick(data)
        if entry.state not in (State.FINISHED, State.FAILED):
            entry.state, entry.finished = State.FINISHED, asked.attempt
        assert finish(self.queue, asked) == (entry.finished == asked.attempt)

    @precondition(lambda self: any(e.ever for e in self.model.values()))
    @rule(data=st.data(), mark=st.sampled_from(["", "m"]))
    def release(self, data: st.DataObject, mark: str) -> None:
        entry, asked, holds = self.pick(data)
        assert self.queue.release(replace(asked, resume_ref=mark)) == holds
        if holds:
            entry.state, entry.asked = State.QUEUED, replace(asked, resume_ref=mark)

    @precondition(lambda self: any(e.ever for e in self.model.values()))
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        entry, asked, holds = self.pick(data)
        assert self.queue.fail(asked, "lost") == holds
        if holds:
            self.strike(entry)

    @rule(live=st.sets(st.sampled_from("uv")))
    def recover(self, live: set[str]) -> None:
        back = [e for e in self.model.values() if e.state is State.LEASED and e.worker not in live]
        for entry in back:
            entry.state = State.QUEUED
            entry.asked = replace(entry.asked, attempt=entry.asked.attempt + 1)
        assert self.queue.recover(sorted(live)) == len(back)

    @rule()
    def reopen(self) -> None:
        self.queue.close()
        self.queue = self.open()

    @invariant()
    def agrees(self) -> None:
        states = [entry.state for entry in self.model.values()]
        assert self.queue.counts() == {state: states.count(state) for state in State}
        ended = [
            (e.asked.request_id, e.asked.attempt if e.finished is None else e.finished, e.state)
            for e in sorted(self.model.values(), key=lambda entry: entry.seq)
            if e.state in (State.FINISHED, State.FAILED)
        ]
        assert ended == [
            (
                r.request.request_id,
                r.request.attempt,
                State.FINISHED if r.judgement.score is not None else State.FAILED,
            )
            for r in self.queue.results(["g", "h"])
        ]


TestSqliteModel = QueueMachine.TestCase
TestSqliteModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.redis
@pytest.mark.usefixtures("redis_model_url")
class TestRedisModel(QueueMachine.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def redis_model_url(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueueMachine, "url", redis_url)
