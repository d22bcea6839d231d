"""`klong eval`: a policy on tasks, through the runner that training uses."""

import asyncio
from collections.abc import Sequence

from rich.console import Console

from klong_jax.core.rollout import RolloutRequest
from klong_jax.core.task import Task
from klong_jax.evals.heldout import eval_rows, plan_eval
from klong_jax.models.decoder import Params
from klong_jax.pipelines.arena import Arena, open_arena
from klong_jax.pipelines.config.acting import EvalSection
from klong_jax.pipelines.config.commands import EvalConfig
from klong_jax.pipelines.policy import load_policy
from klong_jax.pipelines.process import device_mesh, prepare_process
from klong_jax.pipelines.rundir import open_run
from klong_jax.pipelines.stage import stage
from klong_jax.report import data as report
from klong_jax.report.html import write_report
from klong_jax.report.table import print_summary
from klong_jax.text.tasks import load_tasks


def run(config: EvalConfig) -> None:
    """Evaluates, prints the table and writes the report."""
    asyncio.run(_run(config))


async def _run(config: EvalConfig) -> None:
    console = Console()
    mesh = device_mesh(config.mesh)
    policy = load_policy(config.policy, mesh=mesh)
    tasks = load_tasks(config.tasks)
    name: report.Policy = "rl" if (config.policy.name == "rl") else "sft"
    with open_run("eval", config, config.run) as folder:
        prepare_process(folder.path)
        async with open_arena(config, folder, policy, tasks, mesh) as arena:
            rows = await evaluate(
                name, policy.params, tasks, config.eval, config.seed, arena, console
            )
        made = report.RunReport(
            title=f"Evaluation of {config.policy}",
            run_id=folder.run_id,
            extreme_s=config.eval.extreme_s,
            evals=rows,
        )
        print_summary(made, console)
        console.print(f"report: {write_report(folder.path, made)}", markup=False)


async def evaluate(
    name: report.Policy,
    params: Params,
    tasks: Sequence[Task],
    section: EvalSection,
    seed: int,
    arena: Arena,
    console: Console,
) -> tuple[report.EvalRow, ...]:
    """Lets a policy attempt tasks; attempts that a killed run finished are not repeated."""
    requests = plan_eval(
        name, tasks, rollouts=section.rollouts, timeout_s=section.timeout_s, seed=seed
    )
    queue = arena.queue
    queue.put(requests)
    groups = {request.group_id for request in requests}
    with stage(console, f"evaluating {report.POLICY_NAMES[name]}", len(requests)) as advance:
        advance(len(queue.results(groups)))

        def done(request: RolloutRequest) -> None:
            advance(1)

        await arena.play(params, 0, groups, done)
        results = queue.results(groups)
        scores = [result.score for result in results if result.score is not None]
        advance(0, f"mean score {sum(scores) / len(scores):.2f}" if scores else "none judged")
    sizes = {task.task_id: task.title for task in tasks}
    return eval_rows(name, results, sizes, arena.context.limit)
