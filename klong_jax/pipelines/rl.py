"""`klong rl`: progressive RL from a policy on disk."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from klong_jax.core.task import Task
from klong_jax.models.decoder import Params
from klong_jax.pipelines.arena import Arena, open_arena
from klong_jax.pipelines.config.commands import Reinforcing, RlConfig
from klong_jax.pipelines.policy import (
    Policy,
    describe_policy,
    fresh_state,
    load_policy,
)
from klong_jax.pipelines.process import prepare_process
from klong_jax.pipelines.rundir import open_run
from klong_jax.pipelines.stage import stage
from klong_jax.rl.loss import RlLossConfig, rl_loss, window_logprobs
from klong_jax.rl.run import Refer, RlRunConfig, run_rl
from klong_jax.text.tasks import load_tasks
from klong_jax.training.accumulate import Trainer
from klong_jax.training.batches import WindowBatch
from klong_jax.training.checkpoint import Checkpoints
from klong_jax.training.metrics import MetricsLog
from klong_jax.training.optimizer import make_optimizer


def run(config: RlConfig) -> None:
    """Trains; the policy is left in the run's folder `rl`."""
    asyncio.run(_run(config))


async def _run(config: RlConfig) -> None:
    console = Console()
    policy = load_policy(config.policy)
    tasks = load_tasks(config.tasks)
    with open_run("rl", config, config.run) as folder:
        prepare_process(folder.path)
        async with open_arena(config, folder, policy, tasks) as arena:
            await train(folder.path / "rl", config, policy, tasks, arena, console)
        console.print(f"policy in {folder.path / 'rl'}", markup=False)


async def train(
    folder: Path,
    config: Reinforcing,
    policy: Policy,
    tasks: Sequence[Task],
    arena: Arena,
    console: Console,
) -> Policy:
    """Trains a policy through the stages, from its last checkpoint on if there is one."""
    section, temperature = config.rl, config.engine.temperature
    optimizer = section.optimizer.config(0)
    numbers = RlLossConfig(section.clip, section.importance_cap, section.kl_beta, temperature)
    describe_policy(folder, policy)
    checkpoints = Checkpoints(folder / "checkpoints", policy.identity)
    done = checkpoints.latest() or 0
    total = sum(s.max_steps for s in section.stages)
    with stage(console, "progressive RL", total) as advance:
        advance(done)
        state = await run_rl(
            RlRunConfig(
                stages=section.timeline(),
                groups=section.groups,
                rollouts=section.rollouts,
                tokens_per_rollout=section.tokens_per_rollout,
                context_limit=arena.context.limit,
                micro_batch=section.micro_batch,
                seed=config.seed,
            ),
            fresh_state(policy, optimizer),
            Trainer(
                rl_loss(policy.graph, numbers, remat=section.remat),
                make_optimizer(optimizer),
            ),
            arena.queue,
            [task.task_id for task in tasks],
            arena.play,
            _reference(policy, temperature) if section.kl_beta > 0 else lambda batch: batch,
            checkpoints,
            MetricsLog(folder / "metrics.jsonl", done),
            on_step=lambda row: advance(1, _remark(row)),
        )
    checkpoints.close()
    return Policy(policy.config, policy.graph, state.params, policy.tokenizer)


def _reference(policy: Policy, temperature: float) -> Refer:
    @jax.jit
    def logprobs(params: Params, batch: WindowBatch) -> jax.Array:
        return window_logprobs(policy.graph, params, batch, temperature=temperature, remat=False)[0]

    def refer(batch: WindowBatch) -> WindowBatch:
        known = np.asarray(logprobs(policy.params, batch))
        return replace(batch, reference_logprobs=np.pad(known, ((0, 0), (1, 0))))

    return refer


def _remark(row: dict[str, Any]) -> str:
    score = "none valid" if row["mean_score"] is None else f"{row['mean_score']:.2f}"
    return f"stage {row['stage'] + 1} ({row['timeout_s']:g} s): score {score}"
