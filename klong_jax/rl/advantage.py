"""Advantages: how much better a rollout did than its group."""

from collections.abc import Sequence


def leave_one_out(scores: Sequence[float | None]) -> list[float | None]:
    """A_i = r_i minus the mean of the *other* valid rollouts of the group.

    The baseline of a rollout does not contain the rollout itself, so the gradient is unbiased;
    there is no division by the group's deviation, which would weigh tasks by how uncertain they are
    (Ahmadian et al. 2024, arXiv 2402.14740; Liu et al. 2025, arXiv 2503.20783).

    Args:
        scores: One a rollout; None for a rollout that is invalid (infrastructure, judge).

    Returns:
        One a rollout; None where the rollout leaves the loss: it is invalid, or it is alone.
    """
    valid = [score for score in scores if score is not None]
    if len(valid) < 2:
        return [None] * len(scores)
    total = sum(valid)
    return [
        None if score is None else score - (total - score) / (len(valid) - 1) for score in scores
    ]
