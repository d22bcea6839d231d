"""What rollouts need around them: a sandbox service, a judge, a clock and a queue."""

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from pathlib import Path

from klong_jax.core.clock import Clock, VirtualClock, WallClock
from klong_jax.core.task import Task
from klong_jax.judge.executable import ExecutableJudge
from klong_jax.judge.pool import JudgePool
from klong_jax.pipelines.config import AgentSection, ClockSection, QueueSection, SandboxSection
from klong_jax.rollout import open_queue
from klong_jax.rollout.queue import RolloutQueue
from klong_jax.rollout.runner import RolloutRunner, RolloutSettings
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.chat import Chat
from sandbox.client import Limits, SandboxClient, SandboxSpec
from sandbox.service import embedded


def clock_factory(section: ClockSection) -> Callable[[], Clock]:
    """Makes clocks of the kind the settings name."""
    if section.kind == "virtual":
        return lambda: VirtualClock(section.token_s, section.tool_s)
    return WallClock


def sandbox_spec(section: SandboxSection) -> SandboxSpec:
    """The sandbox every rollout gets."""
    limits = Limits(cpus=section.cpus, memory_mb=section.memory_mb, pids=section.pids)
    return SandboxSpec(limits=limits)


@asynccontextmanager
async def open_sandboxes(section: SandboxSection) -> AsyncIterator[SandboxClient]:
    """A client of the service the settings name, which is started here if they name none."""
    token = os.environ.get(section.token_env) if section.token_env else None
    service = (
        nullcontext(section.url)
        if section.url
        else embedded(section.backend, isolation=section.isolation)
    )
    async with AsyncExitStack() as stack:
        url = stack.enter_context(service)
        client = SandboxClient(url, token)
        stack.push_async_callback(client.close)
        yield client


def run_queue(section: QueueSection, folder: Path, run_id: str) -> RolloutQueue:
    """The run's queue; leases of a process that is gone come back at once.

    A run's folder is locked by one process, so every lease found on opening a queue of its own is
    a dead one.
    """
    queue = open_queue(section.url or str(folder / "rollouts.sqlite"), run_id, section.max_attempts)
    queue.recover(())
    return queue


def make_runner(
    client: SandboxClient,
    queue: RolloutQueue,
    tasks: Mapping[str, Task],
    chat: Chat,
    policy: ContextPolicy,
    *,
    agent: AgentSection,
    clock: ClockSection,
    sandbox: SandboxSection,
    slots: int,
) -> RolloutRunner:
    """A runner over a queue with the executable judge."""
    return RolloutRunner(
        queue,
        tasks,
        client,
        JudgePool(ExecutableJudge(client), agent.judges),
        chat,
        RolloutSettings(
            policy=policy,
            make_clock=clock_factory(clock),
            spec=sandbox_spec(sandbox),
            max_turns=agent.max_turns,
            tool_timeout_s=agent.tool_timeout_s,
        ),
        slots=slots,
        worker=f"{os.uname().nodename}/{os.getpid()}",
    )
