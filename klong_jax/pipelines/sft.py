"""`klong sft`: windows of recorded trajectories, and the training run on them."""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from klong_jax.core.errors import Preempted
from klong_jax.core.message import Message
from klong_jax.models.config import Remat
from klong_jax.parallel.distributed import is_first, start_processes, together
from klong_jax.parallel.rules import rounded_up
from klong_jax.pipelines.config.commands import SftConfig
from klong_jax.pipelines.config.training import DrillSection, SftSection
from klong_jax.pipelines.dialect import make_dialect
from klong_jax.pipelines.policy import (
    Policy,
    adapted,
    describe_policy,
    fresh_state,
    load_policy,
    merged,
    new_policy,
)
from klong_jax.pipelines.process import (
    computing,
    device_mesh,
    open_console,
    prepare_process,
)
from klong_jax.pipelines.remat import Step, fitting_trainer
from klong_jax.pipelines.rundir import RunDir, open_run
from klong_jax.pipelines.stage import stage
from klong_jax.pipelines.tokenised import Tokeniser, heldout_windows, tokenised_windows
from klong_jax.report.data import RunReport
from klong_jax.report.html import write_report
from klong_jax.sft.data import WindowDataset, windows_of
from klong_jax.sft.heldout import HeldOut, losses_by_position
from klong_jax.sft.loss import sft_loss
from klong_jax.sft.run import Phase, run_sft
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.dialect import Dialect
from klong_jax.text.tokenizer import bundled_tokenizer, load_tokenizer
from klong_jax.training.accumulate import Trainer, abstract_state
from klong_jax.training.ahead import device_bytes
from klong_jax.training.average import served_params
from klong_jax.training.checkpoint import Checkpoints
from klong_jax.training.metrics import MetricsLog, read_metrics
from klong_jax.training.optimizer import make_optimizer
from klong_jax.training.preemption import noticing_preemption
from klong_jax.training.throughput import Meter


def run(config: SftConfig) -> None:
    """Trains on a file of trajectories; the policy is left in the run's folder `sft`."""
    start_processes(config.processes.place(), cluster=config.processes.cluster)
    console = open_console()
    mesh = device_mesh(config.mesh)
    policy = _start(config, mesh)
    chat = make_dialect(config.tokenizer, policy.tokenizer, policy.origin, policy.learnt)
    policy = replace(policy, learnt=chat)
    with open_run("sft", config, config.run) as folder, computing(mesh, config.kernels):
        prepare_process(folder.path)
        tokeniser = Tokeniser(chat, config.splitting.policy(), config.splitting.options())
        cache = config.run.root / "corpora"
        data = together(
            lambda: tokenised_windows(
                config.data,
                tokeniser,
                cache,
                console,
                draws=config.sft.steps * config.sft.batch,
                seed=config.seed,
                together=config.sft.together,
                shared_prefix=config.sft.shared_prefix,
                rows_share=rows_share(config.sft),
                pack=config.sft.pack,
            )
        )
        judges = together(
            lambda: heldout_windows(config.data, tokeniser, cache, console, pack=config.sft.pack)
        )
        phase = Phase(data, config.sft.steps, config.sft.batch, config.sft.micro_batch)
        train(folder.path / "sft", policy, [phase], config.sft, config.seed, console, judges)
        console.print(f"policy in {folder.path / 'sft'}", markup=False)
        if is_first():
            console.print(f"report: {_report(config, folder)}", markup=False)


def _start(config: SftConfig, mesh: Mesh) -> Policy:
    """The policy on disk that is asked for, else a new one."""
    if config.policy is not None:
        return load_policy(config.policy, mesh=mesh)
    path = config.tokenizer.path
    tokenizer = load_tokenizer(path) if path else bundled_tokenizer()
    return new_policy(config.model, tokenizer, config.seed, mesh)


def _report(config: SftConfig, folder: RunDir) -> Path:
    """Draws the curve of the loss, and the held-out loss along trajectories."""
    rows = read_metrics(folder.path / "sft" / "metrics.jsonl")
    judged = [losses_by_position(row) for row in rows if "heldout_loss" in row]
    made = RunReport(
        title=f"Supervised fine-tuning on {config.data.path.name}",
        run_id=folder.run_id,
        extreme_s=0.0,
        config_summary={
            "data": str(config.data.path),
            "held out": str(config.data.heldout),
            "context limit": config.splitting.context_limit,
            "overlap": config.splitting.overlap,
            "splitting": config.splitting.mode,
        },
        sft_loss=tuple((row["step"], row["loss"]) for row in rows),
        loss_by_position=judged[-1] if judged else (),
        timings={"sft": sum(row["seconds"] for row in rows)},
    )
    return write_report(folder.path, made)


def train(
    folder: Path,
    policy: Policy,
    phases: Sequence[Phase],
    section: SftSection,
    seed: int,
    console: Console,
    heldout: WindowDataset | None = None,
) -> Policy:
    """Trains a policy through phases, from its last checkpoint on if there is one.

    Raises:
        Preempted: SIGTERM was sent; the last step is saved.
    """
    steps = sum(phase.steps for phase in phases)
    policy = adapted(policy, section.lora, seed)
    optimizer = section.optimizer.config(steps, section.lora)
    describe_policy(folder, policy)
    checkpoints = Checkpoints(
        folder / "checkpoints", policy.identity, section.keep_last, section.keep_best, tidy=True
    )
    done = checkpoints.latest() or 0
    metrics = together(lambda: MetricsLog(folder / "metrics.jsonl", done, section.log_to))
    kind = jax.devices()[0].device_kind

    _, frozen = optimizer.selection.split(policy.params)

    def trainer(remat: Remat) -> Trainer:
        loss = sft_loss(policy.graph, remat=remat, scan_layers=section.scan_layers)
        return Trainer(
            loss, make_optimizer(optimizer), section.router_bias_rate, optimizer.selection
        )

    fitting = Step(
        trainer,
        policy.config,
        policy.dtypes.compute,
        abstract_state(policy.params, make_optimizer(optimizer), optimizer.selection),
        [phase.data.layout(phase.micro_batch) for phase in phases],
        -device_bytes(frozen),
    )
    trains = fitting_trainer(section.remat, fitting, folder, console)
    with (
        noticing_preemption() as preemption,
        closing(checkpoints),
        closing(metrics),
        stage(console, "supervised fine-tuning", steps, done) as advance,
    ):
        state = run_sft(
            phases,
            fresh_state(policy, optimizer),
            trains,
            checkpoints,
            metrics,
            Meter.of_devices(
                policy.config, jax.device_count(), kind, optimizer.selection.share(policy.params)
            ),
            seed=seed,
            save_every=section.save_every,
            on_step=lambda row: advance(1, f"{row['phase']}: loss {row['loss']:.3f}"),
            asked_to_stop=preemption.asked,
            heldout=HeldOut(heldout, policy.graph, section.micro_batch) if heldout else None,
        )
    if preemption.agreed:
        raise Preempted
    return merged(replace(policy, params=served_params(state.params, state.opt_state)))


def rows_share(section: SftSection) -> float:
    """Rows of a micro-batch that may stay empty, as a share of a step's groups."""
    return (rounded_up(section.micro_batch, "batch") - 1) / section.batch


def drill_windows(
    name: str,
    chat: Dialect,
    conversations: Iterable[tuple[Message, ...]],
    section: DrillSection,
    *,
    pack: bool,
) -> WindowDataset:
    """Short conversations as windows of their own; those longer than the section's length go.

    Args:
        name: For logs.
        chat: How they are written.
        conversations: The conversations.
        section: The length of a row.
        pack: Whether several share a row.
    """
    context = ContextPolicy(limit=1 << 20, overlap=0, reserve=1)
    windows = [
        window
        for messages in conversations
        for window in windows_of(chat, messages, 0, context, name)
        if len(window.tokens) <= section.length
    ]
    groups = tuple((window,) for window in windows)
    return WindowDataset(name, groups, section.length, pack=pack)
