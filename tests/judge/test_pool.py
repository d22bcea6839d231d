"""The pool's order and bounds, with the real judge over a service that answers when told to."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from klong_jax.core.rollout import Verdict
from klong_jax.core.rubric import parse_rubric
from klong_jax.core.task import Task
from klong_jax.core.trajectory import Status, Trajectory
from klong_jax.judge.executable import ExecutableJudge
from klong_jax.judge.pool import JudgePool
from sandbox.client import SandboxClient

LEAF = {
    "id": "leaf",
    "requirements": "holds",
    "weight": 1,
    "sub_tasks": [],
    "task_category": "Code Development",
    "check": "true",
}


class Gate:
    """A service that holds each request for a new sandbox until it is let go, then refuses it."""

    def __init__(self) -> None:
        self.arrived: asyncio.Queue[str] = asyncio.Queue()
        self.go = asyncio.Semaphore(0)

    async def create(self, request: web.Request) -> web.Response:
        labels = (await request.json())["labels"]
        self.arrived.put_nowait(labels["judges"])
        await self.go.acquire()
        return web.json_response({"kind": "unavailable", "error": "closed."}, status=503)


def gated(test: Callable[[Gate, JudgePool], Coroutine[Any, Any, None]], workers: int) -> None:
    async def run() -> None:
        gate, app = Gate(), web.Application()
        app.router.add_put("/sandboxes/{id}", gate.create)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            async with SandboxClient(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
                await asyncio.wait_for(test(gate, JudgePool(ExecutableJudge(client), workers)), 30)
        finally:
            await runner.cleanup()

    asyncio.run(run())


async def judge(pool: JudgePool, name: str, priority: int) -> None:
    task = Task(name, "", "", ("p",), "", (), parse_rubric(LEAF, "test"), Path(name))
    trajectory = Trajectory(name, name, (), (), (), Status.DONE, 1.0, {})
    judgement = await pool.judge(task, trajectory, b"", {}, priority)
    assert judgement.status is Verdict.FAILED


def test_larger_priorities_go_first_and_equals_in_order_of_arrival() -> None:
    async def test(gate: Gate, pool: JudgePool) -> None:
        wanted = [("running", 0), ("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)]
        async with asyncio.TaskGroup() as group:
            for name, priority in wanted:
                group.create_task(judge(pool, name, priority))
            seen = []
            for _ in wanted:
                seen.append(await gate.arrived.get())
                gate.go.release()
        assert seen == ["running", "b", "d", "a", "c", "e"]

    gated(test, workers=1)


def test_no_more_than_the_workers_run_at_once() -> None:
    async def test(gate: Gate, pool: JudgePool) -> None:
        async with asyncio.TaskGroup() as group:
            for name in "abcde":
                group.create_task(judge(pool, name, 0))
            seen = [await gate.arrived.get(), await gate.arrived.get()]
            for _ in range(3):
                assert gate.arrived.empty()
                gate.go.release()
                seen.append(await gate.arrived.get())
            for _ in range(2):
                gate.go.release()
        assert sorted(seen) == list("abcde")

    gated(test, workers=2)


def test_a_cancelled_wait_costs_no_worker() -> None:
    async def test(gate: Gate, pool: JudgePool) -> None:
        running = asyncio.create_task(judge(pool, "running", 0))
        assert await gate.arrived.get() == "running"
        waiting = asyncio.create_task(judge(pool, "waiting", 9))
        late = asyncio.create_task(judge(pool, "late", 0))
        await asyncio.sleep(0)  # One turn of the loop: both stand in line.
        waiting.cancel()
        gate.go.release()
        assert await gate.arrived.get() == "late"
        gate.go.release()
        await asyncio.gather(running, late)
        assert waiting.cancelled()

    gated(test, workers=1)


def test_a_turn_that_is_given_to_a_cancelled_wait_is_passed_on() -> None:
    async def test(gate: Gate, pool: JudgePool) -> None:
        async def first() -> None:
            await judge(pool, "running", 0)
            # Nothing else has run since the turn was given to the one who waits.
            waiting.cancel()

        running = asyncio.create_task(first())
        assert await gate.arrived.get() == "running"
        waiting = asyncio.create_task(judge(pool, "waiting", 9))
        late = asyncio.create_task(judge(pool, "late", 0))
        await asyncio.sleep(0)
        gate.go.release()
        assert await gate.arrived.get() == "late"
        gate.go.release()
        await asyncio.gather(running, late)
        assert waiting.cancelled()

    gated(test, workers=1)


def test_a_pool_needs_workers() -> None:
    with pytest.raises(ValueError, match="at least one worker"):
        JudgePool(ExecutableJudge(SandboxClient("http://127.0.0.1:1")), 0)
