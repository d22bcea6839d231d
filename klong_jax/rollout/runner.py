"""From rollout requests to judged trajectories: sandbox, agent, artifact, judge, queue.

Each slot takes its requests one after another and slots run side by side, so nobody waits for the
slowest rollout of a group. Which slot serves a request is fixed by the request itself, so a
restarted run computes the same numbers in the same places.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from klong_jax.agent.agent import AgentResult, run_agent
from klong_jax.core.clock import Clock
from klong_jax.core.jsonio import content_hash
from klong_jax.core.rollout import Judgement, RolloutRequest, Verdict
from klong_jax.core.task import Budget, Task
from klong_jax.core.trajectory import Status
from klong_jax.judge.pool import JudgePool
from klong_jax.llm.base import ChatModel
from klong_jax.rollout.queue import RolloutQueue
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.dialect import Dialect
from sandbox.client import SandboxClient, SandboxError, SandboxSpec

_LEASE_S = 120.0


@dataclass(frozen=True)
class RolloutSettings:
    """What all rollouts of a run share.

    Attributes:
        policy: The context policy.
        make_clock: Makes a rollout's clock.
        spec: The sandbox each rollout gets.
        max_turns: Most assistant turns.
        tool_timeout_s: Wall-clock seconds of one command.
    """

    policy: ContextPolicy
    make_clock: Callable[[], Clock]
    spec: SandboxSpec
    max_turns: int
    tool_timeout_s: float


class RolloutRunner:
    """Works off a queue with one agent a slot; use it inside one event loop."""

    def __init__(
        self,
        queue: RolloutQueue,
        tasks: Mapping[str, Task],
        client: SandboxClient,
        judges: JudgePool,
        chat: Dialect,
        settings: RolloutSettings,
        *,
        slots: int,
        worker: str,
    ) -> None:
        self._queue = queue
        self._tasks = tasks
        self._client = client
        self._judges = judges
        self._chat = chat
        self._settings = settings
        self._slots = slots
        self._worker = worker
        self._held: dict[str, RolloutRequest] = {}

    async def drain(
        self,
        groups: Collection[str],
        seat: Callable[[int, RolloutRequest], ChatModel],
        on_done: Callable[[RolloutRequest], None] = lambda request: None,
    ) -> None:
        """Runs everything of some groups that is queued, until nothing is.

        A run that was killed may have left requests of a later step or of another policy; they
        stay for those who play them.

        Args:
            groups: The ids of the groups.
            seat: Gives the model that plays a request in a slot.
            on_done: Called after each request that was worked on.
        """
        heartbeat = asyncio.create_task(self._renew())
        try:
            while leased := self._lease(groups):
                self._held = {request.request_id: request for request in leased}
                lanes: list[deque[RolloutRequest]] = [deque() for _ in range(self._slots)]
                for request in sorted(leased, key=lambda request: request.slot):
                    lanes[request.slot % self._slots].append(request)
                async with asyncio.TaskGroup() as group:
                    for slot, lane in enumerate(lanes):
                        group.create_task(self._work_off(slot, lane, seat, on_done))
        finally:
            heartbeat.cancel()

    def _lease(self, groups: Collection[str]) -> list[RolloutRequest]:
        found = self._queue.lease(self._worker, time.time(), _LEASE_S, limit=10_000)
        for request in found:
            if request.group_id not in groups:
                self._queue.release(request)
        return [request for request in found if request.group_id in groups]

    async def _work_off(
        self,
        slot: int,
        lane: deque[RolloutRequest],
        seat: Callable[[int, RolloutRequest], ChatModel],
        on_done: Callable[[RolloutRequest], None],
    ) -> None:
        while lane:
            request = lane.popleft()
            await self._roll_out(request, seat(slot, request))
            self._held.pop(request.request_id, None)
            on_done(request)

    async def _roll_out(self, request: RolloutRequest, model: ChatModel) -> None:
        task = self._tasks[request.task_id]
        try:
            async with await self._client.create(
                replace(self._settings.spec, image=task.image)
            ) as box:
                result = await run_agent(
                    task,
                    model,
                    box,
                    self._chat,
                    self._settings.policy,
                    Budget(
                        request.timeout_s, self._settings.max_turns, self._settings.tool_timeout_s
                    ),
                    self._settings.make_clock(),
                    trajectory_id=request.trajectory_id,
                    session=request.request_id,
                )
                if result.trajectory.status is Status.INFRA_FAILED:
                    self._queue.fail(request, result.trouble)
                    return
                artifact = await box.download_tree()
        except SandboxError as error:
            self._queue.fail(request, str(error))
            return
        await self._judge(request, task, result, artifact)

    async def _judge(
        self, request: RolloutRequest, task: Task, result: AgentResult, artifact: bytes
    ) -> None:
        trajectory = replace(result.trajectory, artifact_hash=content_hash(artifact))
        judgement: Judgement = await self._judges.judge(
            task, trajectory, artifact, result.evidence, priority=request.priority
        )
        if judgement.status is Verdict.FAILED and "sandbox" in judgement.reason.lower():
            self._queue.fail(request, judgement.reason)
            return
        self._queue.finish(trajectory, request, judgement)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(_LEASE_S / 4)
            for request in list(self._held.values()):
                self._queue.renew(
                    self._worker, request.request_id, request.attempt, time.time(), _LEASE_S
                )
