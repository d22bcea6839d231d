"""Progressive RL's stages: rollout timeouts that grow as the policy does (KLong, section 4)."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from klong_jax.core.errors import UserError


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        timeout_s: Active seconds a rollout may use.
        max_steps: The stage ends after so many optimiser steps.
        advance_score: The stage ends earlier when the mean score of a step reaches this.
        min_steps: But not before so many steps.
    """

    timeout_s: float
    max_steps: int
    advance_score: float = 1.0
    min_steps: int = 1


@dataclass(frozen=True)
class Position:
    """Where a run stands: saved in every checkpoint.

    Attributes:
        stage: Index of the stage; the number of stages when all are done.
        step: Steps taken within the stage.
    """

    stage: int = 0
    step: int = 0


def check_stages(stages: Sequence[Stage]) -> None:
    """Refuses stages that are not progressive.

    Raises:
        UserError: There is none, or a timeout does not grow.
    """
    if not stages:
        raise UserError("rl.stages: at least one stage is needed.")
    for index, (before, after) in enumerate(itertools.pairwise(stages), start=1):
        if after.timeout_s <= before.timeout_s:
            raise UserError(
                f"rl.stages[{index}].timeout_s={after.timeout_s:g} must be larger than the "
                f"{before.timeout_s:g} of the stage before; order the stages by timeout."
            )


def advance(stages: Sequence[Stage], position: Position, mean_score: float | None) -> Position:
    """Where a run stands after a step.

    Args:
        stages: The stages.
        position: Before the step.
        mean_score: Mean score of the step's valid rollouts, None if there was none.
    """
    stage = stages[position.stage]
    step = position.step + 1
    good = mean_score is not None and mean_score >= stage.advance_score and step >= stage.min_steps
    if good or step >= stage.max_steps:
        return Position(position.stage + 1, 0)
    return Position(position.stage, step)
