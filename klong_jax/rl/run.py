"""The progressive RL run: roll out, judge, learn, and advance through the stages."""

import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from klong_jax.core.rollout import RolloutRequest
from klong_jax.models.decoder import Params
from klong_jax.rl.batch import RlBatch, make_batch
from klong_jax.rl.reference import Refer
from klong_jax.rl.stages import Position, Stage, advance, check_stages
from klong_jax.rollout.queue import RolloutQueue
from klong_jax.training.accumulate import Trainer, TrainState
from klong_jax.training.batches import Layout, lay_out
from klong_jax.training.checkpoint import Checkpoints
from klong_jax.training.metrics import MetricsLog
from klong_jax.training.throughput import padding_share


@dataclass(frozen=True)
class RlRunConfig:
    """The shape of the run.

    Attributes:
        stages: The stages in order.
        groups: Tasks a step.
        rollouts: Rollouts a task.
        tokens_per_rollout: The loss's constant C: about how many tokens a rollout samples.
        layout: How rollouts become micro-batches.
        seed: Seeds tasks and sampling.
    """

    stages: tuple[Stage, ...]
    groups: int
    rollouts: int
    tokens_per_rollout: int
    layout: Layout
    seed: int


# Rolls out the step at a position with the given policy, and says what to train on.
Collect = Callable[[Params, Position, int], Awaitable[RlBatch]]


async def run_rl(
    config: RlRunConfig,
    state: TrainState,
    trainer: Trainer,
    collect: Collect,
    refer: Refer,
    checkpoints: Checkpoints,
    metrics: MetricsLog,
    on_step: Callable[[dict[str, Any]], None],
) -> TrainState:
    """Trains through all stages, from the last checkpoint on if there is one.

    Args:
        config: The run.
        state: The initial policy with a fresh optimiser.
        trainer: Takes the optimiser steps.
        collect: Rolls out a step; the same for the same arguments.
        refer: Adds the reference policy's log-probabilities; returns its argument without a KL.
        checkpoints: Where the run is saved after every step.
        metrics: Where a row a step goes.
        on_step: Called with each row.
    """
    check_stages(config.stages)
    position = Position()
    if checkpoints.latest() is not None:
        state, progress = checkpoints.restore(state)
        position = Position(**progress["position"])
    while position.stage < len(config.stages):
        batch = await collect(state.params, position, int(state.step))
        logs: dict[str, float] = {}
        if batch.rollouts:
            micro = list(lay_out(batch.rollouts, batch.advantages, config.layout))
            padding = padding_share(micro)
            planned = config.groups * config.rollouts * config.tokens_per_rollout
            state, logs = trainer.step(state, map(refer, micro), planned)
            logs["padding_share"] = padding
        else:
            # Nothing to learn from a step whose rollouts all scored alike; time still passes.
            state = TrainState(state.params, state.opt_state, state.step + 1)
        mean = sum(batch.scores) / len(batch.scores) if batch.scores else None
        row = {
            "step": int(state.step),
            "stage": position.stage,
            "timeout_s": config.stages[position.stage].timeout_s,
            "mean_score": mean,
            "invalid": batch.invalid,
            "timeouts": batch.timeouts,
            "windows": sum(map(len, batch.rollouts)),
            "mean_turns": batch.mean_turns,
            "mean_active_s": batch.mean_active_s,
            **logs,
        }
        position = advance(config.stages, position, mean)
        metrics.write(row)
        checkpoints.save(state, {"position": asdict(position), "seed": config.seed})
        on_step(row)
    return state


async def roll_out(
    config: RlRunConfig,
    position: Position,
    step: int,
    task_ids: Sequence[str],
    queue: RolloutQueue,
    play: Callable[[Collection[str]], Awaitable[None]],
) -> RlBatch:
    """Rolls out one step.

    Its requests have names that follow from stage, step and slot, and putting them twice changes
    nothing; so a killed run finds its finished rollouts in the queue, rolls out the rest with the
    same seeds and policy, and goes on as if nothing had happened.

    Args:
        config: The run.
        position: Where it stands.
        step: Optimiser steps taken.
        task_ids: What to train on.
        queue: The durable queue.
        play: Works off groups of it with the policy of the step.
    """
    requests = plan_step(config, position, step, task_ids)
    queue.put(requests)
    groups = {request.group_id for request in requests}
    await play(groups)
    return make_batch(queue.results(groups))


def plan_step(
    config: RlRunConfig, position: Position, step: int, task_ids: Sequence[str]
) -> list[RolloutRequest]:
    """The requests of one step: the same for the same arguments."""
    rng = random.Random(f"rl/{config.seed}/{position.stage}/{position.step}")
    chosen = rng.sample(list(task_ids), config.groups)
    requests = []
    for group, task_id in enumerate(chosen):
        for member in range(config.rollouts):
            slot = group * config.rollouts + member
            name = f"rl-{position.stage}-{position.step}-{slot}"
            requests.append(
                RolloutRequest(
                    request_id=name,
                    group_id=f"rl-{position.stage}-{position.step}-{task_id}",
                    slot=slot,
                    task_id=task_id,
                    timeout_s=config.stages[position.stage].timeout_s,
                    seed=rng.getrandbits(31),
                    stage=position.stage,
                    priority=step,
                )
            )
    return requests
