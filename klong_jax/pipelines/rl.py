"""`klong rl`: progressive RL from a policy on disk."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from klong_jax.core.rollout import RolloutRequest
from klong_jax.core.task import Task
from klong_jax.engine.engine import Engine
from klong_jax.models.decoder import Params
from klong_jax.pipelines.config import RlConfig, RlSection
from klong_jax.pipelines.policy import (
    Policy,
    describe_policy,
    fresh_state,
    keep_compiled,
    load_policy,
    make_engine,
)
from klong_jax.pipelines.rundir import open_run
from klong_jax.pipelines.stage import stage
from klong_jax.pipelines.world import make_runner, open_sandboxes, run_queue
from klong_jax.rl.loss import RlLossConfig, rl_loss, window_logprobs
from klong_jax.rl.run import Play, Refer, RlRunConfig, run_rl
from klong_jax.rollout.queue import RolloutQueue
from klong_jax.rollout.runner import RolloutRunner
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.chat import Chat
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
    context = config.splitting.policy()
    with open_run("rl", config, config.run) as folder:
        keep_compiled(folder.path)
        queue = run_queue(config.queue, folder.path, folder.run_id)
        async with open_sandboxes(config.sandbox) as client:
            runner = make_runner(
                client,
                queue,
                {task.task_id: task for task in tasks},
                Chat(policy.tokenizer),
                context,
                agent=config.agent,
                clock=config.clock,
                sandbox=config.sandbox,
                slots=config.engine.slots,
            )
            engine = make_engine(policy, config.engine, context)
            await train(
                folder.path / "rl",
                policy,
                tasks,
                config.rl,
                config.engine.temperature,
                config.seed,
                context,
                queue,
                player(engine, runner),
                console,
            )
            await engine.close()
        queue.close()
        console.print(f"policy in {folder.path / 'rl'}", markup=False)


def player(
    engine: Engine,
    runner: RolloutRunner,
    on_done: Callable[[RolloutRequest], None] = lambda request: None,
) -> Play:
    """Works off the queue with the policy it is given."""

    async def play(params: Params, version: int) -> None:
        engine.load(params, version)
        await runner.drain(lambda slot, request: engine.seat(slot, request.seed), on_done)

    return play


async def train(
    folder: Path,
    policy: Policy,
    tasks: Sequence[Task],
    section: RlSection,
    temperature: float,
    seed: int,
    context: ContextPolicy,
    queue: RolloutQueue,
    play: Play,
    console: Console,
) -> Policy:
    """Trains a policy through the stages, from its last checkpoint on if there is one."""
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
                context_limit=context.limit,
                micro_batch=section.micro_batch,
                seed=seed,
            ),
            fresh_state(policy, optimizer),
            Trainer(
                rl_loss(policy.graph, numbers, remat=section.remat),
                make_optimizer(optimizer),
            ),
            queue,
            [task.task_id for task in tasks],
            play,
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
