"""What is asked of the rollout workers and what the judge says of the result."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


@dataclass(frozen=True)
class RolloutRequest:
    """One rollout that the trainer wants.

    Attributes:
        request_id: Unique name; every write is idempotent on (request_id, attempt).
        group_id: The group whose rollouts are compared with each other.
        slot: Position within the step's rollouts; fixes the engine slot and so the numerics.
        attempt: Counts from 0; a lost worker's request returns as the next attempt.
        task_id: The task to attempt.
        stage: Index of the RL stage, or -1 outside RL.
        timeout_s: Active seconds allowed.
        seed: Seed of the sampling.
        priority: Larger is served first.
        resume_ref: Trajectory to continue from, empty for a fresh start.
    """

    request_id: str
    group_id: str
    slot: int
    task_id: str
    timeout_s: float
    seed: int
    attempt: int = 0
    stage: int = -1
    priority: int = 0
    resume_ref: str = ""

    @property
    def trajectory_id(self) -> str:
        """Name of the trajectory this attempt produces."""
        return f"{self.request_id}.{self.attempt}"

    def to_json(self) -> dict[str, Any]:
        """The request as a JSON object."""
        return asdict(self)


class Verdict(StrEnum):
    """Whether a judgement stands."""

    VALID = "valid"
    FAILED = "failed"


@dataclass(frozen=True)
class Judgement:
    """The rubric's verdict on what a trajectory left behind.

    Attributes:
        trajectory_id: The trajectory judged.
        artifact_hash: Hash of the workspace judged.
        rubric_hash: Hash of the rubric it was judged by.
        judge_id: Which judge spoke.
        leaf_grades: Leaf path to grade in [0, 1].
        score: The weighted score in [0, 1], or None: a judge that failed gives no zero.
        status: VALID, or FAILED when the judge could not do its work.
        reason: Why it failed, one sentence; empty when valid.
    """

    trajectory_id: str
    artifact_hash: str
    rubric_hash: str
    judge_id: str
    leaf_grades: dict[str, float]
    score: float | None
    status: Verdict
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.status is Verdict.VALID) != (self.score is not None):
            raise ValueError(f"{self.trajectory_id}: exactly a valid judgement has a score")

    def to_json(self) -> dict[str, Any]:
        """The judgement as a JSON object."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Judgement":
        """Reads what `to_json` wrote."""
        return Judgement(**{**value, "status": Verdict(value["status"])})
