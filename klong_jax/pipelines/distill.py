"""`klong distill`: a teacher's demonstrations, kept if the judge confirms them."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from klong_jax.agent.tools import tool_schemas
from klong_jax.core.errors import UserError
from klong_jax.core.task import Budget, Task
from klong_jax.factory.distill import DistillReport, Setup, distill
from klong_jax.factory.expert import serve_expert
from klong_jax.judge.executable import ExecutableJudge
from klong_jax.judge.pool import JudgePool
from klong_jax.llm.openai import OpenAIChat
from klong_jax.pipelines.config import (
    AgentSection,
    ClockSection,
    DistillConfig,
    DistillSection,
    TeacherSection,
)
from klong_jax.pipelines.stage import stage
from klong_jax.pipelines.world import clock_factory, open_sandboxes
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.chat import Chat
from klong_jax.text.tasks import load_tasks
from klong_jax.text.tokenizer import bundled_tokenizer
from sandbox.client import SandboxClient


def run(config: DistillConfig) -> None:
    """Demonstrates every task of a folder and writes the confirmed ones."""
    asyncio.run(_run(config))


async def _run(config: DistillConfig) -> None:
    console = Console()
    async with open_sandboxes(config.sandbox) as client:
        await demonstrate(
            load_tasks(config.tasks),
            config.output,
            client,
            teacher=config.teacher,
            section=config.distill,
            agent=config.agent,
            clock=config.clock,
            overlap=config.splitting.overlap,
            reserve=config.splitting.reserve,
            seed=config.seed,
            console=console,
        )
    console.print(f"demonstrations in {config.output}", markup=False)


async def demonstrate(
    tasks: Sequence[Task],
    out: Path,
    client: SandboxClient,
    *,
    teacher: TeacherSection,
    section: DistillSection,
    agent: AgentSection,
    clock: ClockSection,
    overlap: int,
    reserve: int,
    seed: int,
    console: Console,
) -> DistillReport:
    """Lets the teacher attempt the tasks through the scaffold and writes what the judge confirms.

    Raises:
        UserError: Not one demonstration was kept.
    """
    with _endpoint(teacher, seed) as url:
        model = OpenAIChat(
            url,
            teacher.model,
            api_key_env=teacher.key_env,
            tools=tool_schemas(),
            concurrency=section.concurrency,
        )
        habits = f"{teacher.mistake_rate}/{teacher.inspect_rate}/{seed}"
        setup = Setup(
            model=model,
            model_name=teacher.model if teacher.url else f"{teacher.model}/{habits}",
            client=client,
            judge=JudgePool(ExecutableJudge(client), agent.judges),
            chat=Chat(bundled_tokenizer()),
            policy=ContextPolicy(section.context_limit, overlap, reserve),
            budget=Budget(section.timeout_s, agent.max_turns, agent.tool_timeout_s),
            clock=clock_factory(clock),
        )
        async with model:
            with stage(console, "distillation", len(tasks)) as advance:
                before = 0

                def progress(done: int, total: int) -> None:
                    nonlocal before
                    advance(done - before)
                    before = done

                report = await distill(
                    tasks,
                    setup,
                    concurrency=section.concurrency,
                    min_score=section.min_score,
                    out=out,
                    on_progress=progress,
                )
                advance(
                    0,
                    f"{len(report.kept)} kept, {len(report.rejected)} rejected, "
                    f"{len(report.failed)} failed",
                )
    if not report.kept:
        why = next(iter(report.failed.values()), f"none scored {section.min_score:g} or more")
        raise UserError(
            f"{out}: no demonstration was kept ({why}); check the teacher or lower "
            "distill.min_score."
        )
    return report


@contextmanager
def _endpoint(teacher: TeacherSection, seed: int) -> Iterator[str]:
    if teacher.url:
        yield teacher.url
        return
    with serve_expert(
        seed=seed, mistake_rate=teacher.mistake_rate, inspect_rate=teacher.inspect_rate
    ) as url:
        yield url
