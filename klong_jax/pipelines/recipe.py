"""`klong recipe`: tasks, demonstrations, SFT, progressive RL, evaluation and report in one run.

Reads top to bottom like the recipe. Every stage leaves complete files behind and is passed over
when they are there, so the same command after a crash goes on where the run was.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from klong_jax.core.jsonio import write_json
from klong_jax.core.message import ROLES, Message
from klong_jax.core.task import Task
from klong_jax.factory.drills import component_drill, lookup_drill
from klong_jax.pipelines import rl as rl_pipeline
from klong_jax.pipelines import sft as sft_pipeline
from klong_jax.pipelines.arena import open_arena
from klong_jax.pipelines.config.commands import RecipeConfig
from klong_jax.pipelines.config.training import TokenisedDataSection
from klong_jax.pipelines.distill import demonstrate
from klong_jax.pipelines.eval import evaluate
from klong_jax.pipelines.factory import write_tasks
from klong_jax.pipelines.policy import Policy, new_policy
from klong_jax.pipelines.process import computing, device_mesh, prepare_process
from klong_jax.pipelines.rundir import RunDir, open_run
from klong_jax.pipelines.split import plan_recording
from klong_jax.pipelines.tokenised import Tokeniser, tokenised_windows
from klong_jax.report.data import EvalRow, RlPoint, RunReport
from klong_jax.report.data import Policy as PolicyName
from klong_jax.report.html import write_report
from klong_jax.report.table import print_summary
from klong_jax.sft.run import Phase
from klong_jax.text.chat import Chat
from klong_jax.text.formats import Recording, message_to_openai, read_recordings
from klong_jax.text.tasks import load_task
from klong_jax.text.tokenizer import (
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from klong_jax.training.metrics import read_metrics


def run(config: RecipeConfig) -> None:
    """Runs or resumes the recipe; ends with a table and a report."""
    console = Console()
    with open_run("recipe", config, config.run) as folder:
        console.print(f"run {folder.path}", markup=False)
        prepare_process(folder.path)
        asyncio.run(_Recipe(config, folder, console).run())


@dataclass(frozen=True)
class _Tasks:
    """The run's tasks by what they are for."""

    demonstrated: list[Task]
    practised: list[Task]
    heldout: list[Task]


class _Recipe:
    """One run of the recipe."""

    def __init__(self, config: RecipeConfig, folder: RunDir, console: Console) -> None:
        self.config = config
        self.folder = folder
        self.path = folder.path
        self.console = console
        self.context = config.splitting.policy()
        self.options = config.splitting.options()
        self.mesh = device_mesh(config.mesh)
        self._clock = time.monotonic()

    @property
    def _demonstrations(self) -> Path:
        return self.path / "demonstrations.jsonl"

    async def run(self) -> None:
        """The recipe, stage by stage."""
        tasks = self._make_tasks()
        recordings = await self._demonstrate(tasks.demonstrated)
        tokenizer = self._train_tokenizer(recordings)
        self._write_plan(recordings, tokenizer)
        base = new_policy(self.config.model, tokenizer, self.config.seed, self.mesh)
        self.console.print(f"{'a decoder of':<24} {base.parameters:,} parameters", markup=False)
        with computing(self.mesh, self.config.kernels):
            sft = self._fine_tune(base)
            self._report(await self._reinforce(base, sft, tasks))

    def _make_tasks(self) -> _Tasks:
        sizes, seed, root = self.config.tasks, self.config.seed, self.path / "tasks"
        if self.folder.done("tasks") is None:
            write_tasks(
                root / "demonstrated",
                "demonstrated",
                seed,
                sizes.demonstrated_components,
                sizes.demonstrated,
            )
            long = sizes.long_components
            write_tasks(root / "demonstrated", "long", seed, long, len(long))
            write_tasks(
                root / "practised", "practised", seed, sizes.practised_components, sizes.practised
            )
            heldout = sizes.heldout_components
            write_tasks(root / "heldout", "heldout", seed, heldout, len(heldout))
            self._done("tasks")
        return _Tasks(*(_load(root / name) for name in ("demonstrated", "practised", "heldout")))

    async def _demonstrate(self, tasks: list[Task]) -> list[Recording]:
        out = self._demonstrations
        if self.folder.done("distill") is None:
            await demonstrate(self.config, tasks, out, self.console)
            self._done("distill")
        return list(read_recordings(out))

    def _train_tokenizer(self, recordings: Sequence[Recording]) -> Tokenizer:
        file = self.path / "tokenizer.json"
        if not file.exists():
            conversations = [recording.messages for recording in recordings]
            conversations += [lookup_drill(seed) for seed in range(200)]
            texts = [text for messages in conversations for text in _texts(messages)]
            texts += ROLES * len(conversations)
            trained: HuggingFaceTokenizer = train_tokenizer(texts, self.config.tokenizer.vocab_size)
            trained.save(file)
        return load_tokenizer(file)

    def _write_plan(self, recordings: Sequence[Recording], tokenizer: Tokenizer) -> None:
        chat = Chat(tokenizer)
        plans = [
            plan_recording(chat, recording, self.context, self.options) for recording in recordings
        ]
        longest = max(plans, key=lambda plan: plan.stream_tokens)
        ratio = longest.stream_tokens / self.context.limit
        self.console.print(
            f"{'split':<24} {len(plans)} trajectories into "
            f"{sum(len(plan.windows) for plan in plans)} windows; the longest has "
            f"{longest.turns} turns and overflows the context {ratio:.0f} times",
            markup=False,
        )
        write_json(self.path / "plan.json", [plan.to_json() for plan in plans])

    def _fine_tune(self, base: Policy) -> Policy:
        chat, sft = Chat(base.tokenizer), self.config.sft
        phases = []
        for name, section, make in (
            ("look-up drills", self.config.lookup_drills, lookup_drill),
            ("component drills", self.config.component_drills, component_drill),
        ):
            if section.conversations and section.steps:
                first = self.config.seed * 1_000_000
                seeds = range(first, first + section.conversations)
                conversations = map(make, seeds)
                data = sft_pipeline.drill_windows(name, chat, conversations, section, pack=sft.pack)
                # As many tokens a gradient call as with windows, in calls of one size.
                tokens = sft.micro_batch * self.context.limit
                calls = math.ceil(section.batch * section.length / tokens)
                rows = math.ceil(section.batch / calls)
                phases.append(Phase(data, section.steps, section.batch, rows))
        data = tokenised_windows(
            TokenisedDataSection(
                path=self._demonstrations,
                skip_bad=False,
                mix=(),
                heldout=None,
                cache=None,
                workers=1,
            ),
            Tokeniser(chat, self.context, self.options),
            self.path / "corpora",
            self.console,
            draws=sft.steps * sft.batch,
            seed=self.config.seed,
            together=sft.together,
            shared_prefix=sft.shared_prefix,
            rows_share=sft_pipeline.rows_share(sft),
            pack=sft.pack,
        )
        phases.append(Phase(data, sft.steps, sft.batch, sft.micro_batch))
        policy = sft_pipeline.train(
            self.path / "sft", base, phases, sft, self.config.seed, self.console
        )
        if self.folder.done("sft") is None:
            self._done("sft")
        return policy

    async def _reinforce(self, base: Policy, sft: Policy, tasks: _Tasks) -> list[EvalRow]:
        config, rows = self.config, list[EvalRow]()
        played = [*tasks.practised, *tasks.heldout]
        async with open_arena(config, self.folder, sft, played, self.mesh) as arena:
            trained = await rl_pipeline.train(
                self.path / "rl", config, sft, tasks.practised, arena, self.console
            )
            if self.folder.done("rl") is None:
                self._done("rl")
            compared: dict[PolicyName, Policy] = {"base": base, "sft": sft, "rl": trained}
            for name, policy in compared.items():
                rows += await evaluate(
                    name,
                    policy.params,
                    tasks.heldout,
                    config.eval,
                    config.seed,
                    arena,
                    self.console,
                )
            if self.folder.done("eval") is None:
                self._done("eval")
        return rows

    def _report(self, rows: Sequence[EvalRow]) -> None:
        config = self.config
        sft = read_metrics(self.path / "sft" / "metrics.jsonl")
        stages = ("tasks", "distill", "sft", "rl", "eval")
        made = RunReport(
            title=f"klong recipe, profile {config.profile}, seed {config.seed}",
            run_id=self.folder.run_id,
            extreme_s=config.eval.extreme_s,
            config_summary={
                "context limit": config.splitting.context_limit,
                "overlap": config.splitting.overlap,
                "splitting": config.splitting.mode,
                "stage timeouts": [stage.timeout_s for stage in config.rl.stages],
                "evaluation timeout": config.eval.timeout_s,
                "clock": config.clock.kind,
                "sandbox": config.sandbox.backend,
            },
            sft_loss=tuple((row["step"], row["loss"]) for row in sft),
            rl_steps=tuple(
                RlPoint(
                    step=row["step"],
                    stage=row["stage"],
                    mean_reward=row["mean_score"],
                    mean_turns=row["mean_turns"],
                    mean_active_s=row["mean_active_s"],
                    timeouts=row["timeouts"],
                    kl=row.get("kl", 0.0),
                    loss=row.get("loss", 0.0),
                    invalid=row["invalid"],
                )
                for row in read_metrics(self.path / "rl" / "metrics.jsonl")
            ),
            evals=tuple(rows),
            timings={
                name: (self.folder.done(name) or {"seconds": 0.0})["seconds"] for name in stages
            },
        )
        page = write_report(self.path, made)
        print_summary(made, self.console)
        self.console.print(f"report: {page}", markup=False)

    def _done(self, stage: str) -> None:
        """Marks a stage complete with the seconds since the last one, restarts not counted."""
        now = time.monotonic()
        self.folder.mark(stage, {"seconds": now - self._clock})
        self._clock = now


def _load(root: Path) -> list[Task]:
    return [load_task(path) for path in sorted(root.iterdir())]


def _texts(messages: Sequence[Message]) -> list[str]:
    """What a tokenizer should be good at: contents, and tool calls as they are written."""
    texts = [message.content for message in messages if message.content]
    for message in messages:
        for call in message_to_openai(message).get("tool_calls", ()):
            function = call["function"]
            texts.append(f'{{"name": "{function["name"]}", "arguments": {function["arguments"]}}}')
    return texts
