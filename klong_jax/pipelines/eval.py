"""`klong eval`: a policy on tasks, through the runner that training uses."""

import asyncio
from collections.abc import Sequence

from rich.console import Console

from klong_jax.core.rollout import RolloutRequest
from klong_jax.core.task import Task
from klong_jax.engine.engine import Engine
from klong_jax.evals.heldout import eval_rows, plan_eval
from klong_jax.models.decoder import Params
from klong_jax.pipelines.config import EvalConfig, EvalSection
from klong_jax.pipelines.policy import keep_compiled, load_policy, make_engine
from klong_jax.pipelines.rl import player
from klong_jax.pipelines.rundir import open_run
from klong_jax.pipelines.stage import stage
from klong_jax.pipelines.world import make_runner, open_sandboxes, run_queue
from klong_jax.report import data as report
from klong_jax.report.html import write_report
from klong_jax.report.table import print_summary
from klong_jax.rollout.queue import RolloutQueue
from klong_jax.rollout.runner import RolloutRunner
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.chat import Chat
from klong_jax.text.tasks import load_tasks


def run(config: EvalConfig) -> None:
    """Evaluates, prints the table and writes the report."""
    asyncio.run(_run(config))


async def _run(config: EvalConfig) -> None:
    console = Console()
    policy = load_policy(config.policy)
    tasks = load_tasks(config.tasks)
    context = config.splitting.policy()
    name: report.Policy = "rl" if (config.policy.name == "rl") else "sft"
    with open_run("eval", config, config.run) as folder:
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
            rows = await evaluate(
                name,
                policy.params,
                tasks,
                config.eval,
                config.seed,
                context,
                queue,
                engine,
                runner,
                console,
            )
            await engine.close()
        queue.close()
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
    context: ContextPolicy,
    queue: RolloutQueue,
    engine: Engine,
    runner: RolloutRunner,
    console: Console,
) -> tuple[report.EvalRow, ...]:
    """Lets a policy attempt tasks; attempts that a killed run finished are not repeated."""
    requests = plan_eval(
        name, tasks, rollouts=section.rollouts, timeout_s=section.timeout_s, seed=seed
    )
    queue.put(requests)
    groups = {request.group_id for request in requests}
    with stage(console, f"evaluating {report.POLICY_NAMES[name]}", len(requests)) as advance:
        advance(len(queue.results(groups)))

        def done(request: RolloutRequest) -> None:
            advance(1)

        await player(engine, runner, done)(params, 0)
        results = queue.results(groups)
        scores = [result.score for result in results if result.score is not None]
        advance(0, f"mean score {sum(scores) / len(scores):.2f}" if scores else "none judged")
    sizes = {task.task_id: task.title for task in tasks}
    return eval_rows(name, results, sizes, context.limit)
