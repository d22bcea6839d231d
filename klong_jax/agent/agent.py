"""Runs one agent at one task in one sandbox, to a trajectory.

Trouble of the infrastructure gives INFRA_FAILED, which is no zero. Running out of budget is a valid
end.
"""

from dataclasses import dataclass

from klong_jax.agent.loop import Rollout
from klong_jax.core.clock import Clock
from klong_jax.core.evidence import collect_evidence
from klong_jax.core.task import Budget, Task
from klong_jax.core.trajectory import Trajectory
from klong_jax.llm.base import ChatModel
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.dialect import Dialect
from sandbox.client import Sandbox


@dataclass(frozen=True)
class AgentResult:
    """What a rollout gives.

    Attributes:
        trajectory: What the agent did.
        evidence: Files of `.judge/` by name, for the judge.
        progress: (assistant turn, estimate in [0, 1]) wherever the estimate rose.
        trouble: What the infrastructure did wrong, one sentence; empty when nothing.
    """

    trajectory: Trajectory
    evidence: dict[str, str]
    progress: tuple[tuple[int, float], ...] = ()
    trouble: str = ""


async def run_agent(
    task: Task,
    model: ChatModel,
    sandbox: Sandbox,
    chat: Dialect,
    policy: ContextPolicy,
    budget: Budget,
    clock: Clock,
    *,
    trajectory_id: str,
    session: str,
) -> AgentResult:
    """Lets the model attempt the task.

    Args:
        task: The task; its workspace is written into the sandbox first.
        model: Who speaks.
        sandbox: Where the work is done; what is left in it is the artifact.
        chat: The dialect, which must be the model's where the model gives tokens.
        policy: The context policy.
        budget: What may be spent, in the clock's seconds.
        clock: Counts active seconds.
        trajectory_id: Names the trajectory.
        session: Names the rollout to the model.

    Raises:
        UserError: What the task pins does not fit the policy's context; nothing was run.
    """
    rollout = Rollout(task, model, sandbox, chat, policy, budget, clock, session)
    try:
        status = await rollout.run()
    finally:
        await rollout.forget()
    context = rollout.context
    failures = {str(name): count for name, count in sorted(rollout.failures.items()) if count}
    trajectory = Trajectory(
        trajectory_id=trajectory_id,
        task_id=task.task_id,
        messages=tuple(context.messages),
        turns=tuple(context.turns),
        spans=context.spans,
        status=status,
        active_s=clock.active_s(),
        failures=failures,
        pinned_messages=context.pinned_messages,
    )
    files = collect_evidence(task, context.messages, rollout.reading.read)
    return AgentResult(trajectory, files, tuple(rollout.progress.points), rollout.trouble)
