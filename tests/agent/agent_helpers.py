"""A scripted model over real tokens, and what a rollout in a real sandbox needs."""

import asyncio
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from klong_jax.agent.agent import AgentResult, run_agent
from klong_jax.core.clock import Clock, VirtualClock
from klong_jax.core.message import Message, ToolCall
from klong_jax.core.rubric import parse_rubric
from klong_jax.core.task import Budget, Task
from klong_jax.llm.base import ChatModel, Completion, Prompt
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.chat import Chat
from klong_jax.text.tokenizer import train_tokenizer
from sandbox.client import SandboxClient

READ = [("read_paper", {"section": n}) for n in (1, 2)]
WIDE = ContextPolicy(limit=4096, overlap=512, reserve=256)
Spoken = str | tuple[str, dict[str, object]]


@cache
def chat() -> Chat:
    texts = ["system user assistant read_paper section write_file path content bash command x=$1"]
    return Chat(train_tokenizer(texts * 3, 400))


def make_task(finish_check: str = "", sections: Sequence[str] = ("1 One\na", "2 Two\nb")) -> Task:
    leaf = {"id": "l", "requirements": "r", "weight": 1, "sub_tasks": []}
    rubric = {**leaf, "task_category": "Code Development", "check": "true"}
    return Task(
        task_id="t",
        title="t",
        instructions="Read sections 1 to 2, then do steps 1 to 4.",
        paper=tuple(sections),
        addendum="",
        blacklist=("https://bad",),
        rubric=parse_rubric(rubric, "t"),
        root=Path("t"),
        workspace={"data.txt": "hello\n"},
        finish_check=finish_check,
    )


class Script:
    """Says what it is given, in order, as tokens; then ends the task.

    A string is sampled raw text; a pair is a tool call. Like an engine it parses its own tokens.
    """

    def __init__(self, *spoken: Spoken, version: int = 3) -> None:
        self.spoken = list(spoken)
        self.version = version
        self.prompts: list[Prompt] = []
        self.forgotten: list[str] = []

    async def complete(
        self, prompt: Prompt, *, max_tokens: int, deadline_s: float | None
    ) -> Completion:
        self.prompts.append(prompt)
        said = self.spoken.pop(0) if self.spoken else ("end_task", {})
        if isinstance(said, str):
            ids = chat().tokenizer.encode(said + "<|im_end|>", specials=True)
        else:
            message = Message("assistant", "", tool_calls=(ToolCall(*said),))
            ids = chat().output_ids(message)
        cut = len(ids) > max_tokens
        ids = ids[:max_tokens]
        parsed = chat().parse(ids)
        return Completion(
            message=parsed.message,
            output_ids=tuple(ids),
            logprobs=tuple(-0.5 for _ in ids),
            finish_reason="length" if cut else "stop",
            version=self.version,
            gen_s=0.01,
            problem=parsed.problem,
        )

    async def forget(self, session: str) -> None:
        self.forgotten.append(session)


def rollout(
    url: str,
    task: Task,
    model: ChatModel,
    *,
    policy: ContextPolicy = WIDE,
    budget: Budget | None = None,
    clock: Clock | None = None,
) -> AgentResult:
    async def run() -> AgentResult:
        async with SandboxClient(url) as client, await client.create() as box:
            return await run_agent(
                task,
                model,
                box,
                chat(),
                policy,
                budget or Budget(1e6, max_turns=60),
                clock or VirtualClock(0.01, 1.0),
                trajectory_id="t.0",
                session="s",
            )

    return asyncio.run(run())


def answers(result: AgentResult) -> list[str]:
    """What the environment said after the opening."""
    return [m.content for m in result.trajectory.messages[2:] if m.role in ("tool", "user")]
