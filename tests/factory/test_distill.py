"""Distillation in real sandboxes: rejection, resumption, determinism, infrastructure failures."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from klong_jax.agent.tools import tool_schemas
from klong_jax.core.clock import VirtualClock
from klong_jax.core.errors import UserError
from klong_jax.core.task import Budget, Task
from klong_jax.factory.distill import DistillReport, Setup, distill
from klong_jax.factory.expert import MODEL, Habits, serve_expert
from klong_jax.factory.replicate import make_task
from klong_jax.judge.executable import ExecutableJudge
from klong_jax.judge.pool import JudgePool
from klong_jax.llm.openai import OpenAIChat
from klong_jax.splitting.policy import ContextPolicy, split
from klong_jax.text.chat import Chat
from klong_jax.text.formats import read_recordings
from klong_jax.text.tokenizer import train_tokenizer
from sandbox.client import SandboxClient, SandboxSpec
from sandbox.service import embedded

TASKS = [make_task(seed, 4 + seed) for seed in range(3)]
CHAT = Chat(train_tokenizer([text for task in TASKS for text in task.paper] * 3, 500))
POLICY = ContextPolicy(limit=1000, overlap=200, reserve=150)


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with embedded("local") as url:
        yield url


def run(
    service: str,
    expert: str,
    out: Path,
    *,
    tasks: list[Task] = TASKS,
    timeout_s: float = 1e6,
    concurrency: int = 3,
    min_score: float = 1.0,
    policy: ContextPolicy = POLICY,
) -> DistillReport:
    async def inner() -> DistillReport:
        async with (
            SandboxClient(service) as client,
            OpenAIChat(expert, MODEL, tools=tool_schemas(), max_retries=0) as model,
        ):
            setup = Setup(
                model=model,
                model_name=MODEL,
                client=client,
                spec=SandboxSpec(),
                judge=JudgePool(ExecutableJudge(client), 2),
                chat=CHAT,
                policy=policy,
                budget=Budget(timeout_s),
                clock=lambda: VirtualClock(0.01, 0.5),
            )
            return await distill(
                tasks, setup, concurrency=concurrency, min_score=min_score, out=out
            )

    return asyncio.run(inner())


def test_confirmed_attempts_are_written_and_a_second_run_takes_them_over(
    service: str, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    with serve_expert(Habits(mistake_rate=0.3, inspect_rate=0.3)) as expert:
        report = run(service, expert, one)
        (tmp_path / "one.jsonl.parts" / f"{TASKS[1].task_id}.json").unlink()
        again = run(service, expert, one)
        run(service, expert, two, tasks=TASKS[::-1], concurrency=1)
    assert report.kept == {task.task_id: 1.0 for task in TASKS}
    assert (report.resumed, again.resumed) == (0, 2)
    assert one.read_bytes() == two.read_bytes()
    recordings = list(read_recordings(one))
    assert [r.recording_id for r in recordings] == sorted(task.task_id for task in TASKS)
    for recording in recordings:
        assert recording.pinned_messages is not None
        turns, prefix_len = CHAT.turns(recording.messages, recording.pinned_messages)
        assert len(turns) == recording.meta["assistant_turns"]
        assert split(turns, prefix_len, POLICY)[-1].end > prefix_len


def test_what_the_judge_does_not_confirm_is_not_written(service: str, tmp_path: Path) -> None:
    out = tmp_path / "demos.jsonl"
    with serve_expert(Habits()) as expert:
        report = run(service, expert, out, timeout_s=8.0)
        assert not report.kept
        assert set(report.rejected) == {task.task_id for task in TASKS}
        assert out.read_text() == ""
        # The attempts stand: another bar needs no other attempt.
        lower = run(service, expert, out, timeout_s=8.0, min_score=0.0)
    assert (lower.resumed, len(lower.kept)) == (3, 3)


def test_infrastructure_failures_are_reported_and_not_kept(service: str, tmp_path: Path) -> None:
    out = tmp_path / "demos.jsonl"
    report = run(service, "http://127.0.0.1:9/v1", out)
    assert set(report.failed) == {task.task_id for task in TASKS}
    assert "127.0.0.1:9" in report.failed[TASKS[0].task_id]
    assert not list(tmp_path.glob("*.parts/*"))


def test_a_context_too_small_for_the_paper_names_the_task(service: str, tmp_path: Path) -> None:
    tight = ContextPolicy(limit=200, overlap=10, reserve=50)
    with serve_expert(Habits()) as expert, pytest.raises(UserError, match=TASKS[0].task_id):
        run(service, expert, tmp_path / "demos.jsonl", tasks=TASKS[:1], policy=tight)
