"""Which requests a policy plays, and what becomes of those that the host would not let it play."""

import asyncio
from pathlib import Path
from typing import Any, cast

from queue_helpers import finish, request

from klong_jax.core.rollout import RolloutRequest
from klong_jax.core.rubric import parse_rubric
from klong_jax.core.task import Task
from klong_jax.core.trajectory import Status
from klong_jax.llm.base import ChatModel
from klong_jax.rollout import open_queue
from klong_jax.rollout.queue import RolloutQueue, State
from klong_jax.rollout.runner import RolloutRunner, RolloutSettings
from sandbox.client import SandboxClient, SandboxSpec
from sandbox.service import embedded


class Played(RolloutRunner):
    """A runner whose rollouts end at once, as if judged."""

    def __init__(self, queue: RolloutQueue) -> None:
        unused = cast(Any, None)
        super().__init__(queue, {}, unused, unused, unused, unused, slots=2, worker="w")
        self.played: list[str] = []

    async def _roll_out(self, request: RolloutRequest, model: ChatModel) -> None:
        self.played.append(request.request_id)
        finish(self._queue, request)


def test_what_another_policy_is_to_play_stays_for_it(tmp_path: Path) -> None:
    queue = open_queue(str(tmp_path / "queue.sqlite"), "run", 1)
    queue.put(
        [request("later-0", "later"), *(request(f"now-{n}", "now", slot=n) for n in range(3))]
    )
    # The run that was killed had begun with it.
    assert [one.request_id for one in queue.lease("dead", 0.0, 60.0)] == ["later-0"]
    queue.recover(())
    runner = Played(queue)

    def seat(slot: int, request: RolloutRequest) -> ChatModel:
        return cast(ChatModel, None)

    asyncio.run(runner.drain({"now"}, seat))
    assert sorted(runner.played) == ["now-0", "now-1", "now-2"]
    assert queue.counts({"later"})[State.QUEUED] == 1
    asyncio.run(runner.drain({"later"}, seat))
    assert runner.played[3:] == ["later-0"]
    assert [result.request.attempt for result in queue.results({"later"})] == [1]


def test_a_sandbox_service_that_is_away_gives_no_score(tmp_path: Path) -> None:
    leaf = {"id": "l", "requirements": "r", "weight": 1, "sub_tasks": []}
    rubric = parse_rubric({**leaf, "task_category": "Code Development", "check": "true"}, "t")
    task = Task("task", "t", "work", (), "", (), rubric, tmp_path)
    unused = cast(Any, None)
    settings = RolloutSettings(unused, unused, SandboxSpec(), max_turns=1, tool_timeout_s=1.0)
    queue = open_queue(str(tmp_path / "queue.sqlite"), "run", 2)
    queue.put([request("r-0")])
    with embedded("local") as url:
        pass

    async def main() -> None:
        async with SandboxClient(url) as client:
            tasks = {"task": task}
            runner = RolloutRunner(
                queue, tasks, client, unused, unused, settings, slots=1, worker="w"
            )
            await runner.drain({"g"}, lambda _slot, _request: unused)

    asyncio.run(main())
    (result,) = queue.results({"g"})
    assert result.request.attempt == 1  # The second.
    assert result.trajectory.status is Status.INFRA_FAILED
    assert result.judgement.score is None and "does not answer" in result.judgement.reason
