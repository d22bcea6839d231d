"""`klong rl`: progressive RL from a policy on disk."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh
from rich.console import Console

from klong_jax.core.errors import UserError
from klong_jax.core.task import Task
from klong_jax.models.config import Remat
from klong_jax.models.decoder import Params
from klong_jax.models.lora import ADAPTERS, adapted_matrices
from klong_jax.parallel.distributed import (
    from_first,
    is_first,
    own_part,
    settled,
    start_processes,
    together,
)
from klong_jax.parallel.rules import SERVING, param_shardings, param_specs
from klong_jax.pipelines.arena import Arena, open_arena
from klong_jax.pipelines.config.commands import Reinforcing, RlConfig
from klong_jax.pipelines.policy import (
    Policy,
    adapted,
    describe_policy,
    fresh_state,
    load_policy,
    merged,
)
from klong_jax.pipelines.process import (
    computing,
    device_mesh,
    open_console,
    prepare_process,
)
from klong_jax.pipelines.remat import Step, fitting_trainer
from klong_jax.pipelines.rundir import open_run
from klong_jax.pipelines.stage import stage
from klong_jax.rl.batch import RlBatch
from klong_jax.rl.loss import RlLossConfig, rl_loss
from klong_jax.rl.reference import make_refer
from klong_jax.rl.run import Collect, RlRunConfig, roll_out, run_rl
from klong_jax.rl.stages import Position
from klong_jax.text.tasks import load_tasks
from klong_jax.training.accumulate import Trainer, abstract_state
from klong_jax.training.ahead import device_bytes
from klong_jax.training.average import served_params
from klong_jax.training.batches import Layout
from klong_jax.training.checkpoint import Checkpoints
from klong_jax.training.frozen import Selection
from klong_jax.training.metrics import MetricsLog
from klong_jax.training.optimizer import make_optimizer


def run(config: RlConfig) -> None:
    """Trains; the policy is left in the run's folder `rl`."""
    start_processes(config.processes.place(), cluster=config.processes.cluster)
    asyncio.run(_run(config))


async def _run(config: RlConfig) -> None:
    console = open_console()
    mesh = device_mesh(config.mesh)
    _check_host(mesh)
    policy = load_policy(config.policy, mesh=mesh)
    tasks = together(lambda: load_tasks(config.tasks))
    with open_run("rl", config, config.run) as folder, computing(mesh, config.kernels):
        prepare_process(folder.path)
        async with AsyncExitStack() as opened:
            opening: Callable[[], Arena | None] = _no_arena
            if is_first():
                arena = open_arena(config, folder, policy, tasks, mesh.local_mesh)
                opening = await settled(opened.enter_async_context(arena))
            await train(folder.path / "rl", config, policy, tasks, together(opening), console)
        console.print(f"policy in {folder.path / 'rl'}", markup=False)


def _check_host(mesh: Mesh) -> None:
    """Rollouts are served by the devices of the first process, which must hold whole weights."""
    for axis in ("tensor", "expert"):
        here = mesh.local_mesh.shape[axis]
        if here != mesh.shape[axis]:
            raise UserError(
                f"mesh.{axis}={mesh.shape[axis]}: rollouts are served on the devices of one host, "
                f"where this mesh has {here} of them along {axis}; choose a smaller mesh.{axis}."
            )


async def train(
    folder: Path,
    config: Reinforcing,
    policy: Policy,
    tasks: Sequence[Task],
    arena: Arena | None,
    console: Console,
) -> Policy:
    """Trains a policy through the stages, from its last checkpoint on if there is one.

    Args:
        folder: Where the policy is left.
        config: All settings.
        policy: Where to start.
        tasks: What to train on.
        arena: Where the policy acts; the first of several processes has it, and tells the others.
        console: For progress.
    """
    section, temperature = config.rl, config.engine.temperature
    start, policy = policy, adapted(policy, section.lora, config.seed)
    optimizer = section.optimizer.config(0, section.lora)
    numbers = RlLossConfig(section.clip, section.importance_cap, section.kl_beta, temperature)
    describe_policy(folder, policy)
    checkpoints = Checkpoints(folder / "checkpoints", policy.identity, tidy=True)
    done = checkpoints.latest() or 0
    total = sum(s.max_steps for s in section.stages)

    _, frozen = optimizer.selection.split(policy.params)

    def trainer(remat: Remat) -> Trainer:
        loss = rl_loss(policy.graph, numbers, remat=remat, scan_layers=section.scan_layers)
        return Trainer(
            loss, make_optimizer(optimizer), section.router_bias_rate, optimizer.selection
        )

    shape = RlRunConfig(
        stages=section.timeline(),
        groups=section.groups,
        rollouts=section.rollouts,
        tokens_per_rollout=section.tokens_per_rollout,
        layout=Layout(
            config.splitting.context_limit,
            section.micro_batch,
            (section.shared_prefix,),
            pack=section.pack,
        ),
        seed=config.seed,
    )
    fitting = Step(
        trainer,
        policy.config,
        policy.dtypes.compute,
        abstract_state(policy.params, make_optimizer(optimizer), optimizer.selection),
        [shape.layout],
        _served_bytes(policy.params) - device_bytes(frozen),
    )
    trains = fitting_trainer(section.remat, fitting, folder, console)
    metrics = together(lambda: MetricsLog(folder / "metrics.jsonl", done, section.log_to))
    with (
        closing(checkpoints),
        closing(metrics),
        stage(console, "progressive RL", total, done) as advance,
    ):
        state = await run_rl(
            shape,
            fresh_state(policy, optimizer),
            trains,
            _collector(shape, [task.task_id for task in tasks], arena, policy),
            make_refer(start.graph, start.params, temperature)
            if section.kl_beta > 0
            else lambda batch: batch,
            checkpoints,
            metrics,
            on_step=lambda row: advance(1, _remark(row)),
        )
    return merged(replace(policy, params=served_params(state.params, state.opt_state)))


def _served_bytes(params: Params) -> int:
    """Bytes on a device of what rollouts are served with, beside what is trained.

    One device serves with the parameters that it trains, but for matrices that adapters are added
    to; of several, each holds more than its part.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.size == 1:
        return device_bytes(adapted_matrices(params))
    _, served = Selection(learnt=ADAPTERS).split(params)
    places = param_shardings(served, mesh, SERVING)
    leaves = zip(jax.tree.leaves(served), jax.tree.leaves(places), strict=True)
    return sum(prod(at.shard_shape(x.shape)) * x.dtype.itemsize for x, at in leaves)


def _collector(
    config: RlRunConfig, task_ids: Sequence[str], arena: Arena | None, policy: Policy
) -> Collect:
    """Rolls out in the first process, with what its devices hold, and tells the others."""

    async def collect(params: Params, position: Position, step: int) -> RlBatch:
        params = merged(replace(policy, params=params)).params
        mesh = jax.sharding.get_mesh()
        own = own_part(params, mesh, param_specs(params, mesh, SERVING))
        give: Callable[[], RlBatch] = _untold
        if arena is not None:
            play = partial(arena.play, own, step)
            give = await settled(roll_out(config, position, step, task_ids, arena.queue, play))
        return from_first(give)

    return collect


def _no_arena() -> None:
    """What the other processes have of it."""


def _untold() -> NoReturn:
    raise AssertionError("only the first process rolls out")


def _remark(row: dict[str, Any]) -> str:
    score = "none valid" if row["mean_score"] is None else f"{row['mean_score']:.2f}"
    return f"stage {row['stage'] + 1} ({row['timeout_s']:g} s): score {score}"
