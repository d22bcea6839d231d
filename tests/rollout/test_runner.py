"""Which requests a policy plays: its own, whatever a killed run left beside them."""

import asyncio
from pathlib import Path
from typing import Any, cast

from queue_helpers import finish, request

from klong_jax.core.rollout import RolloutRequest
from klong_jax.llm.base import ChatModel
from klong_jax.rollout import open_queue
from klong_jax.rollout.queue import RolloutQueue, State
from klong_jax.rollout.runner import RolloutRunner


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
