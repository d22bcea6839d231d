"""`klong distill`: a teacher's demonstrations, kept if the judge confirms them."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from klong_jax.agent.tools import tool_schemas
from klong_jax.core.errors import UserError
from klong_jax.core.task import Budget, Task
from klong_jax.factory.distill import DistillReport, Setup, distill
from klong_jax.factory.expert import Habits, serve_expert
from klong_jax.judge.executable import ExecutableJudge
from klong_jax.judge.pool import JudgePool
from klong_jax.llm.openai import OpenAIChat
from klong_jax.pipelines.config.commands import DistillConfig, RecipeConfig
from klong_jax.pipelines.stage import stage
from klong_jax.pipelines.world import clock_factory, open_sandboxes, sandbox_spec
from klong_jax.text.chat import Chat
from klong_jax.text.tasks import load_tasks
from klong_jax.text.tokenizer import bundled_tokenizer
from sandbox.client import SandboxClient


def run(config: DistillConfig) -> None:
    """Demonstrates every task of a folder and writes the confirmed ones."""
    asyncio.run(_run(config))


async def _run(config: DistillConfig) -> None:
    console = Console()
    await demonstrate(config, load_tasks(config.tasks), config.output, console)
    console.print(f"demonstrations in {config.output}", markup=False)


async def demonstrate(
    config: DistillConfig | RecipeConfig, tasks: Sequence[Task], out: Path, console: Console
) -> DistillReport:
    """Lets the teacher attempt the tasks through the scaffold and writes what the judge confirms.

    Raises:
        UserError: Not one demonstration was kept.
    """
    section, teacher = config.distill, config.teacher
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(open_sandboxes(config.sandbox))
        url = stack.enter_context(_endpoint(config))
        model = OpenAIChat(
            url,
            teacher.model,
            api_key_env=teacher.key_env,
            tools=tool_schemas(),
            concurrency=section.concurrency,
        )
        await stack.enter_async_context(model)
        setup = _setup(config, model, client)
        advance = stack.enter_context(stage(console, "distillation", len(tasks)))
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


def _setup(config: DistillConfig | RecipeConfig, model: OpenAIChat, client: SandboxClient) -> Setup:
    teacher, agent = config.teacher, config.agent
    return Setup(
        model=model,
        model_name=teacher.model if teacher.url else repr(_habits(config)),
        client=client,
        spec=sandbox_spec(config.sandbox),
        judge=JudgePool(ExecutableJudge(client), agent.judges),
        chat=Chat(bundled_tokenizer()),
        policy=config.distill.context.policy(),
        budget=Budget(config.distill.timeout_s, agent.max_turns, agent.tool_timeout_s),
        clock=clock_factory(config.clock),
    )


@contextmanager
def _endpoint(config: DistillConfig | RecipeConfig) -> Iterator[str]:
    if config.teacher.url:
        yield config.teacher.url
        return
    with serve_expert(_habits(config)) as url:
        yield url


def _habits(config: DistillConfig | RecipeConfig) -> Habits:
    teacher = config.teacher
    return Habits(config.seed, teacher.mistake_rate, teacher.inspect_rate, teacher.lapse_rate)
