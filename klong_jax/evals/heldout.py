"""Held-out tasks for one policy: the requests, and what their results say."""

import random
from collections.abc import Sequence

from klong_jax.core.rollout import RolloutRequest
from klong_jax.core.task import Task
from klong_jax.report.data import EvalRow, Policy
from klong_jax.rollout.queue import RolloutResult


def plan_eval(
    policy: Policy, tasks: Sequence[Task], *, rollouts: int, timeout_s: float, seed: int
) -> list[RolloutRequest]:
    """One request a task and attempt; every policy gets the same seeds and timeout."""
    rng = random.Random(f"eval/{seed}")
    return [
        RolloutRequest(
            request_id=f"eval-{policy}-{task.task_id}-{attempt}",
            group_id=f"eval-{policy}-{task.task_id}",
            slot=index * rollouts + attempt,
            task_id=task.task_id,
            timeout_s=timeout_s,
            seed=rng.getrandbits(31),
        )
        for index, task in enumerate(tasks)
        for attempt in range(rollouts)
    ]


def eval_rows(
    policy: Policy, results: Sequence[RolloutResult], sizes: dict[str, str], context_limit: int
) -> tuple[EvalRow, ...]:
    """What the report shows of each attempt.

    Args:
        policy: Whose attempts they are.
        results: From the queue.
        sizes: Task id to how large it is, in words.
        context_limit: Tokens the policy sees at once.
    """
    return tuple(
        EvalRow(
            policy=policy,
            task_id=result.request.task_id,
            size=sizes[result.request.task_id],
            score=result.score,
            assistant_turns=result.trajectory.assistant_turns,
            active_s=result.trajectory.active_s,
            context_ratio=result.trajectory.stream_len / context_limit,
            windows=len(result.trajectory.spans),
            status=str(result.trajectory.status),
            failures=result.trajectory.failures,
        )
        for result in sorted(results, key=lambda result: result.request.slot)
    )
