"""Distillation with rejection sampling: demonstrations of an expert that the judge confirms.

The expert works through the same scaffold, sandboxes and judge as the policy will, so that what is
written down is what the policy can do. Every judged attempt is kept as a file of its own, so that a
run that was stopped goes on where it stopped, and the final file does not depend on who was first.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from klong_jax.agent.agent import AgentResult, run_agent
from klong_jax.core.clock import Clock
from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import content_hash, read_json, write_json
from klong_jax.core.message import Message
from klong_jax.core.rollout import Judgement
from klong_jax.core.task import Budget, Task
from klong_jax.core.trajectory import Status, Trajectory
from klong_jax.llm.base import ChatModel
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.dialect import Dialect
from klong_jax.text.formats import Recording, write_openai_jsonl
from sandbox.client import SandboxClient, SandboxError, SandboxSpec

_ATTEMPTS = 2


class Judge(Protocol):
    """Who grades; `ExecutableJudge` and `JudgePool` do."""

    async def judge(
        self, task: Task, trajectory: Trajectory, artifact: bytes, evidence: Mapping[str, str]
    ) -> Judgement:
        """Grades one artifact."""
        ...


@dataclass(frozen=True)
class Setup:
    """What every attempt is made with.

    Attributes:
        model: The expert.
        model_name: Its name and settings; parts of another expert are not taken over.
        client: Where sandboxes come from.
        spec: The sandbox every attempt gets.
        judge: Who confirms.
        chat: The dialect that contexts are counted in.
        policy: The context policy.
        budget: What an attempt may spend.
        clock: Makes the clock of an attempt.
    """

    model: ChatModel
    model_name: str
    client: SandboxClient
    spec: SandboxSpec
    judge: Judge
    chat: Dialect
    policy: ContextPolicy
    budget: Budget
    clock: Callable[[], Clock]

    def key(self, task: Task) -> str:
        """Identifies what an attempt at the task depends on."""
        return content_hash(
            {
                "model": self.model_name,
                "tokenizer": self.chat.tokenizer.content_hash,
                "policy": asdict(self.policy),
                "budget": asdict(self.budget),
                "clock": repr(self.clock()),
                "sandbox": asdict(self.spec),
                "instructions": task.instructions,
                "addendum": task.addendum,
                "paper": task.paper,
                "workspace": task.workspace,
                "blacklist": task.blacklist,
                "finish_check": task.finish_check,
                "image": task.image,
                "rubric": task.rubric.content_hash,
            }
        )


@dataclass(frozen=True)
class DistillReport:
    """What came of a distillation.

    Attributes:
        kept: Task to score, of what was written.
        rejected: Task to score, of what the judge did not confirm.
        failed: Task to reason, of what the infrastructure did not let happen.
        resumed: How many attempts an earlier run had made already.
    """

    kept: dict[str, float]
    rejected: dict[str, float]
    failed: dict[str, str]
    resumed: int


async def distill(
    tasks: Sequence[Task],
    setup: Setup,
    *,
    concurrency: int,
    min_score: float,
    out: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> DistillReport:
    """Lets the expert attempt every task once and writes the confirmed attempts.

    Args:
        tasks: The tasks, each with an id of its own.
        setup: What every attempt is made with.
        concurrency: Attempts at once.
        min_score: Lowest score that is kept.
        out: The JSONL to write; attempts lie beside it in `<out>.parts/`.
        on_progress: Told (attempts finished, all) after each.

    Raises:
        UserError: A task does not fit the context, a part cannot be read, or the disk refuses;
            finished attempts are kept.
    """
    parts = out.with_name(f"{out.name}.parts")
    places = asyncio.Semaphore(concurrency)
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    resumed = 0

    async def one(task: Task) -> None:
        nonlocal resumed
        path, key = parts / f"{quote(task.task_id, safe='')}.json", setup.key(task)
        part = read_json(path) if path.exists() else None
        if part is not None and part.get("key") == key:
            found[task.task_id] = part
            resumed += 1
        else:
            async with places:
                part, reason = await _attempts(task, setup)
            if part is None:
                failed[task.task_id] = reason
            else:
                write_json(path, {"key": key, **part})
                found[task.task_id] = part
        on_progress(len(found) + len(failed), len(tasks))

    try:
        async with asyncio.TaskGroup() as group:
            for task in tasks:
                group.create_task(one(task))
    except ExceptionGroup as errors:
        for error in errors.exceptions:
            if isinstance(error, UserError):
                raise error from None
        raise
    return _write(found, failed, resumed, min_score, out)


def _write(
    found: dict[str, dict[str, Any]],
    failed: dict[str, str],
    resumed: int,
    min_score: float,
    out: Path,
) -> DistillReport:
    """Writes what is confirmed, by task id, and says what came of everything."""
    scores = {task_id: float(found[task_id]["score"]) for task_id in sorted(found)}
    kept = {task_id: score for task_id, score in scores.items() if score >= min_score}
    write_openai_jsonl(out, [_recording(task_id, found[task_id]) for task_id in kept])
    rejected = {task_id: score for task_id, score in scores.items() if task_id not in kept}
    return DistillReport(kept, rejected, dict(sorted(failed.items())), resumed)


async def _attempts(task: Task, setup: Setup) -> tuple[dict[str, Any] | None, str]:
    """Attempts until one is judged; returns its part, or None and the last reason."""
    reason = ""
    for attempt in range(_ATTEMPTS):
        try:
            result, judgement = await _attempt(task, setup, attempt)
        except SandboxError as error:
            reason = str(error)
            continue
        if result.trajectory.status is Status.INFRA_FAILED:
            reason = result.trouble
        elif judgement is None or judgement.score is None:
            reason = judgement.reason if judgement else "not judged"
        else:
            return _part(result.trajectory, judgement.score), ""
    return None, reason


async def _attempt(task: Task, setup: Setup, attempt: int) -> tuple[AgentResult, Judgement | None]:
    name = f"distill/{task.task_id}.{attempt}"
    spec = replace(setup.spec, image=task.image, labels={"task": task.task_id})
    async with await setup.client.create(spec) as box:
        result = await run_agent(
            task,
            setup.model,
            box,
            setup.chat,
            setup.policy,
            setup.budget,
            setup.clock(),
            trajectory_id=name,
            session=name,
        )
        if result.trajectory.status is Status.INFRA_FAILED:
            return result, None
        artifact = await box.download_tree()
    judgement = await setup.judge.judge(task, result.trajectory, artifact, result.evidence)
    return result, judgement


def _part(trajectory: Trajectory, score: float) -> dict[str, Any]:
    return {
        "score": score,
        "assistant_turns": trajectory.assistant_turns,
        "active_s": trajectory.active_s,
        "status": str(trajectory.status),
        "failures": trajectory.failures,
        "pinned_messages": trajectory.pinned_messages,
        "messages": [message.to_json() for message in trajectory.messages],
    }


def _recording(task_id: str, part: dict[str, Any]) -> Recording:
    told = ("score", "assistant_turns", "active_s", "status", "failures")
    return Recording(
        source=task_id,
        recording_id=task_id,
        messages=tuple(Message.from_json(message) for message in part["messages"]),
        pinned_messages=part["pinned_messages"],
        meta={"task_id": task_id, **{name: part[name] for name in told}},
    )
