"""From judged rollouts to the windows of one optimiser step."""

from collections.abc import Sequence
from dataclasses import dataclass

from klong_jax.core.trajectory import Status
from klong_jax.rl.advantage import leave_one_out
from klong_jax.rollout.queue import RolloutResult
from klong_jax.training.batches import Group


@dataclass(frozen=True)
class RlBatch:
    """What a step trains on and what is told about it.

    Attributes:
        rollouts: The windows of each rollout with a non-zero advantage.
        advantages: One a rollout.
        scores: Scores of the valid rollouts.
        invalid: Rollouts lost to infrastructure or to the judge.
        timeouts: Valid rollouts that ran out of time.
        mean_turns: Assistant turns of the valid rollouts, averaged.
        mean_active_s: Active seconds of the valid rollouts, averaged.
    """

    rollouts: tuple[Group, ...]
    advantages: tuple[float, ...]
    scores: tuple[float, ...]
    invalid: int
    timeouts: int
    mean_turns: float
    mean_active_s: float


def make_batch(results: Sequence[RolloutResult]) -> RlBatch:
    """Groups results by their explicit group ids and weighs every rollout by its advantage."""
    groups: dict[str, list[RolloutResult]] = {}
    for result in sorted(
        results, key=lambda result: (result.request.group_id, result.request.slot)
    ):
        groups.setdefault(result.request.group_id, []).append(result)
    rollouts: list[Group] = []
    advantages: list[float] = []
    for members in groups.values():
        weighed = leave_one_out([member.score for member in members])
        for member, advantage in zip(members, weighed, strict=True):
            if advantage:
                rollouts.append(member.trajectory.windows())
                advantages.append(advantage)
    valid = [result for result in results if result.score is not None]
    count = max(1, len(valid))
    return RlBatch(
        rollouts=tuple(rollouts),
        advantages=tuple(advantages),
        scores=tuple(result.score for result in valid if result.score is not None),
        invalid=len(results) - len(valid),
        timeouts=sum(result.trajectory.status is Status.TIMEOUT for result in valid),
        mean_turns=sum(result.trajectory.assistant_turns for result in valid) / count,
        mean_active_s=sum(result.trajectory.active_s for result in valid) / count,
    )
