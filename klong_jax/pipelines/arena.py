"""Where a policy acts: an engine that serves it, and a runner that works off a queue with it."""

import os
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jax.sharding import Mesh

from klong_jax.core.rollout import RolloutRequest
from klong_jax.core.task import Task
from klong_jax.engine.engine import Engine, Scope
from klong_jax.judge.executable import ExecutableJudge
from klong_jax.judge.pool import JudgePool
from klong_jax.models.decoder import Params
from klong_jax.parallel.rules import SERVING
from klong_jax.pipelines.config.acting import QueueSection
from klong_jax.pipelines.config.commands import ActingConfig
from klong_jax.pipelines.policy import Policy, make_engine
from klong_jax.pipelines.process import computing
from klong_jax.pipelines.rundir import RunDir
from klong_jax.pipelines.world import clock_factory, open_sandboxes, sandbox_spec
from klong_jax.rollout import open_queue
from klong_jax.rollout.queue import RolloutQueue
from klong_jax.rollout.runner import RolloutRunner, RolloutSettings
from klong_jax.splitting.policy import ContextPolicy


@dataclass(frozen=True)
class Arena:
    """What policies of one decoder and tokenizer act through.

    Attributes:
        context: What they see of their task at each turn.
        queue: Holds what is to be played and what was judged.
    """

    context: ContextPolicy
    queue: RolloutQueue
    _engine: Engine
    _runner: RolloutRunner
    _scope: Scope

    async def play(
        self,
        params: Params,
        version: int,
        groups: Collection[str],
        on_done: Callable[[RolloutRequest], None] = lambda request: None,
    ) -> None:
        """Works off some groups of the queue with a policy.

        Args:
            params: The policy's parameters.
            version: Recorded with every token it samples.
            groups: The ids of the groups.
            on_done: Told each request that was judged.
        """
        self._engine.load(params, version)
        seat = self._engine.seat
        with self._scope():
            await self._runner.drain(
                groups, lambda slot, request: seat(slot, request.seed), on_done
            )


@asynccontextmanager
async def open_arena(
    config: ActingConfig, folder: RunDir, policy: Policy, tasks: Sequence[Task], mesh: Mesh
) -> AsyncIterator[Arena]:
    """Opens sandboxes, queue and engine, on a mesh, for policies like this one on these tasks."""
    context = config.splitting.policy()
    with closing(_open_queue(config.queue, folder.path, folder.run_id)) as queue:
        async with open_sandboxes(config.sandbox) as client:
            runner = RolloutRunner(
                queue,
                {task.task_id: task for task in tasks},
                client,
                JudgePool(ExecutableJudge(client), config.agent.judges),
                policy.dialect,
                RolloutSettings(
                    policy=context,
                    make_clock=clock_factory(config.clock),
                    spec=sandbox_spec(config.sandbox),
                    max_turns=config.agent.max_turns,
                    tool_timeout_s=config.agent.tool_timeout_s,
                ),
                slots=config.engine.slots,
                worker=f"{os.uname().nodename}/{os.getpid()}",
            )
            scope = partial(computing, mesh, config.kernels, SERVING)
            engine = make_engine(policy, config.engine, context, scope)
            try:
                yield Arena(context, queue, engine, runner, scope)
            finally:
                await engine.close()


def _open_queue(section: QueueSection, folder: Path, run_id: str) -> RolloutQueue:
    """The run's queue; leases of a process that is gone come back at once.

    A run's folder is locked by one process, so every lease found on opening a queue of its own is
    a dead one.
    """
    queue = open_queue(section.url or str(folder / "rollouts.sqlite"), run_id, section.max_attempts)
    queue.recover(())
    return queue
