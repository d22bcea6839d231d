"""The scripted expert, over a real socket, through the real scaffold, to a real judgement."""

import asyncio
from pathlib import Path

import httpx
import pytest

from klong_jax.agent.agent import AgentResult, run_agent
from klong_jax.agent.tools import tool_schemas
from klong_jax.core.clock import VirtualClock
from klong_jax.core.evidence import collect_evidence
from klong_jax.core.rollout import Judgement
from klong_jax.core.task import Budget, Task
from klong_jax.core.trajectory import Status
from klong_jax.factory.expert import MODEL, Habits, serve_expert
from klong_jax.factory.replicate import make_task
from klong_jax.judge.executable import ExecutableJudge
from klong_jax.llm.openai import OpenAIChat
from klong_jax.splitting.policy import ContextPolicy, split
from klong_jax.text.chat import Chat
from klong_jax.text.tokenizer import train_tokenizer
from sandbox.client import SandboxClient
from sandbox.service import embedded

# Some five turns of work beside the paper.
POLICY = ContextPolicy(limit=900, overlap=200, reserve=120)


def corpus(task: Task) -> Chat:
    texts = [*task.paper, task.instructions, *task.workspace.values()]
    return Chat(train_tokenizer(texts * 3, 600))


def solve(
    url: str, task: Task, expert: str, policy: ContextPolicy = POLICY, **budget: float
) -> tuple[AgentResult, Judgement]:
    async def run() -> tuple[AgentResult, Judgement]:
        async with (
            SandboxClient(url) as client,
            OpenAIChat(expert, MODEL, tools=tool_schemas()) as model,
            await client.create() as box,
        ):
            result = await run_agent(
                task,
                model,
                box,
                corpus(task),
                policy,
                Budget(budget.get("timeout_s", 1e6)),
                VirtualClock(0.01, 0.5),
                trajectory_id="r.0",
                session="r.0",
            )
            artifact = await box.download_tree()
            judge = ExecutableJudge(client)
            return result, await judge.judge(task, result.trajectory, artifact, result.evidence)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def service():
    with embedded("local") as url:
        yield url


def test_solves_a_task_through_many_windows(service: str) -> None:
    task = make_task(3, 12)
    with serve_expert(Habits(inspect_rate=0.3)) as expert:
        result, judgement = solve(service, task, expert)
    trajectory = result.trajectory
    assert (trajectory.status, judgement.score) == (Status.DONE, 1.0), result.trouble
    assert len(trajectory.spans) > 3
    prefix_len = trajectory.spans[0].prefix_len
    assert split(trajectory.turns, prefix_len, POLICY) == trajectory.spans
    assert all(window.length <= POLICY.limit for window in trajectory.spans)
    assert result.progress[-1][1] == 1.0
    assert result.evidence == collect_evidence(task, trajectory.messages, {1, 2, 3, 4})
    # As a recording it is tokenised to the very same turns.
    turns, recorded_prefix = corpus(task).turns(trajectory.messages, trajectory.pinned_messages)
    assert recorded_prefix == prefix_len
    pairs = zip(turns, trajectory.turns, strict=True)
    assert all((a.suffix_ids, a.output_ids) == (b.suffix_ids, b.output_ids) for a, b in pairs)


def test_mistakes_are_mended_and_equal_seeds_are_equal_rollouts(service: str) -> None:
    task = make_task(5, 8)
    with serve_expert(Habits(seed=1, mistake_rate=0.6, inspect_rate=0.5)) as expert:
        first, judgement = solve(service, task, expert)
        again, _ = solve(service, task, expert)
    outputs = [m.content for m in first.trajectory.messages if m.role == "tool"]
    mismatches = [i for i, text in enumerate(outputs) if text.startswith("mismatch")]
    assert judgement.score == 1.0
    assert first.trajectory.failures["tool_error"] == len(mismatches) > 0
    assert first.trajectory.to_json() == again.trajectory.to_json()


def test_lapses_are_answered_and_the_task_is_solved_all_the_same(service: str) -> None:
    task = make_task(6, 8)
    with serve_expert(Habits(seed=2, lapse_rate=0.3)) as expert:
        result, judgement = solve(service, task, expert)
    failures = result.trajectory.failures
    assert judgement.score == 1.0
    assert failures["no_tool_call"] > 0
    assert failures["refused_before_reading"] > 0


def test_without_the_paper_in_sight_it_cannot_know(service: str) -> None:
    task = make_task(3, 4)
    messages = [
        {"role": "user", "content": task.instructions},
        {"role": "user", "content": "<tool_response>\nnext 1;gain;alpha\n</tool_response>"},
    ]
    with serve_expert(Habits()) as expert:
        answer = httpx.post(f"{expert}/chat/completions", json={"messages": messages}).json()
        assert httpx.get(f"{expert}/models").json()["data"][0]["id"] == MODEL
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "write_file"
    assert "$((x*f*c))" in call["arguments"]
    assert answer["usage"]["completion_tokens"] > 0


def test_a_timeout_keeps_partial_credit(service: str, tmp_path: Path) -> None:
    task = make_task(3, 12)
    with serve_expert(Habits()) as expert:
        result, judgement = solve(service, task, expert, timeout_s=12.0)
    assert result.trajectory.status is Status.TIMEOUT
    assert judgement.score is not None
    assert 0.1 < judgement.score < 0.9
