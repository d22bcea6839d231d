"""The contract of the durable rollout queue.

A request is QUEUED, then LEASED to a worker, then FINISHED or FAILED. Each operation is one
transaction, so a process may die between any two instructions: what was finished stays finished,
what was leased comes back.

The *attempt* fences workers. A lease belongs to (request_id, attempt); whenever a lease is taken
away the attempt rises, so the former holder can be told apart and its `renew`, `release` and `fail`
change nothing. Its `finish` still counts if no other attempt has finished: work done is never
thrown away, and a request never has two results.

What infrastructure does to a request (`fail`, a lease that ran out) counts against `max_attempts`.
What the operator does (`release`, `recover` after a restart) does not.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from klong_jax.core.rollout import Judgement, RolloutRequest, Verdict
from klong_jax.core.trajectory import Status, Trajectory


class State(StrEnum):
    """Where a request stands."""

    QUEUED = "queued"
    LEASED = "leased"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class RolloutResult:
    """How a request ended.

    Attributes:
        request: The request, with the attempt that counts.
        trajectory: What that attempt did; INFRA_FAILED and empty if the request was given up.
        judgement: What the judge said of it.
    """

    request: RolloutRequest
    trajectory: Trajectory
    judgement: Judgement

    @property
    def score(self) -> float | None:
        """The score; None where infrastructure or judge failed, which is never a zero."""
        if self.trajectory.status is Status.INFRA_FAILED:
            return None
        return self.judgement.score


class RolloutQueue(Protocol):
    """Requests in, judged trajectories out; safe for many threads and processes at once.

    Times are seconds of one clock that all callers share (`time.time()` on hosts in step).
    """

    def put(self, requests: Sequence[RolloutRequest]) -> int:
        """Adds the requests whose ids are new; a known id changes nothing, finished or not.

        Returns:
            How many were new.
        """
        ...

    def lease(
        self, worker: str, now_s: float, lease_s: float, limit: int = 1
    ) -> list[RolloutRequest]:
        """Gives up to `limit` requests to a worker, highest priority first, then in put order.

        Leases that ran out by `now_s` are taken away first; their requests return as the next
        attempt, or are given up after `max_attempts`.
        """
        ...

    def renew(
        self, worker: str, request_id: str, attempt: int, now_s: float, lease_s: float
    ) -> bool:
        """Extends a lease to `now_s + lease_s`; False if the worker does not hold it any more."""
        ...

    def finish(self, trajectory: Trajectory, request: RolloutRequest, judgement: Judgement) -> bool:
        """Stores a result; the first attempt to finish is the one that counts.

        Returns:
            Whether this attempt is the one that counts; finishing it again says so again and
            changes nothing.
        """
        ...

    def release(self, request: RolloutRequest) -> bool:
        """Gives a request back, attempt unchanged; `request.resume_ref` is kept for the next lease.

        Returns:
            False if the attempt does not hold the lease any more; nothing changed.
        """
        ...

    def fail(self, request: RolloutRequest, reason: str) -> bool:
        """Reports that the infrastructure failed: next attempt, or given up after `max_attempts`.

        Returns:
            False if the attempt does not hold the lease any more; nothing changed.
        """
        ...

    def results(self, group_ids: Collection[str]) -> list[RolloutResult]:
        """The results so far of these groups, given-up requests included, in put order."""
        ...

    def counts(self, group_ids: Collection[str] | None = None) -> Mapping[State, int]:
        """How many requests stand in each state; of these groups only, if any are named."""
        ...

    def recover(self, live_workers: Collection[str]) -> int:
        """Takes back the leases of all other workers at once; for the restart of a run.

        Returns:
            How many requests came back, as the next attempt.
        """
        ...

    def close(self) -> None:
        """Lets go of the connection; leases stay."""
        ...


def check_finish(trajectory: Trajectory, request: RolloutRequest, judgement: Judgement) -> None:
    """Refuses what must not be stored as a result.

    Raises:
        ValueError: The three do not belong together, or the rollout has not ended.
    """
    for noun, name in (("trajectory", trajectory), ("judgement", judgement)):
        if name.trajectory_id != request.trajectory_id:
            raise ValueError(
                f"{noun} {name.trajectory_id} does not belong to {request.trajectory_id}"
            )
    if trajectory.status in (Status.SUSPENDED, Status.INFRA_FAILED):
        raise ValueError(
            f"{trajectory.trajectory_id} is {trajectory.status}: release or fail its request"
        )


def given_up(request: RolloutRequest, reason: str) -> RolloutResult:
    """The result of a request that the infrastructure failed: it closes its group, unscored."""
    return RolloutResult(
        request=request,
        trajectory=Trajectory(
            trajectory_id=request.trajectory_id,
            task_id=request.task_id,
            messages=(),
            turns=(),
            spans=(),
            status=Status.INFRA_FAILED,
            active_s=0.0,
            failures={Status.INFRA_FAILED.value: 1},
        ),
        judgement=Judgement(
            trajectory_id=request.trajectory_id,
            artifact_hash="",
            rubric_hash="",
            judge_id="",
            leaf_grades={},
            score=None,
            status=Verdict.FAILED,
            reason=reason,
        ),
    )
