"""The loop of one rollout.

Open a turn, let the model speak, run what it called, tell it what came of it. What the model does
wrong is answered in a line and counted; what the infrastructure does wrong ends the rollout.
"""

from collections import Counter
from dataclasses import replace

from klong_jax.agent import prompts
from klong_jax.agent.context import Context
from klong_jax.agent.failures import Failure
from klong_jax.agent.output import spoken
from klong_jax.agent.progress import Progress
from klong_jax.agent.reading import Reading
from klong_jax.agent.tools import Outcome, Toolbox
from klong_jax.core.clock import Clock
from klong_jax.core.message import Message, ToolCall
from klong_jax.core.task import Budget, Task
from klong_jax.core.trajectory import Status
from klong_jax.llm.base import (
    ChatModel,
    Completion,
    ContextLengthExceeded,
    ModelUnavailable,
    Prompt,
)
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.dialect import Dialect
from sandbox.client import Sandbox, SandboxError

# Most tokens of a tool's answer, the paper's sections apart.
TOOL_OUTPUT_TOKENS = 4096
# Calls of one turn that are run: each needs room for an answer that says something.
_MOST_CALLS, _TOKENS_A_CALL = 16, 64


class Rollout:
    """The state of one rollout and its loop."""

    def __init__(
        self,
        task: Task,
        model: ChatModel,
        sandbox: Sandbox,
        chat: Dialect,
        policy: ContextPolicy,
        budget: Budget,
        clock: Clock,
        session: str,
    ) -> None:
        self._task, self._model, self._sandbox = task, model, sandbox
        self._policy, self._budget, self._clock, self._session = policy, budget, clock, session
        self.reading = Reading(task.paper)
        self.context = Context(
            chat,
            policy,
            session,
            prompts.opening(task),
            f"task {task.task_id}",
            self.reading.tokens(chat),
        )
        self._tools = Toolbox(sandbox, self.reading)
        self.progress = Progress(task.instructions)
        self.failures: Counter[Failure] = Counter()
        self.trouble = ""
        self._last_call: ToolCall | None = None
        self._repeats = 0

    async def run(self) -> Status:
        """Loops until the task ends, the budget is spent or the infrastructure fails."""
        try:
            if self._task.workspace:
                await self._sandbox.upload_tree(self._task.workspace)
            await self._sandbox.arm(self.reading.gates(self._task.finish_check))
            while True:
                status = await self._turn()
                if status:
                    return status
        except ModelUnavailable as error:
            return self._infrastructure(Failure.MODEL_ERROR, error)
        except ContextLengthExceeded as error:
            return self._infrastructure(Failure.CONTEXT_LENGTH_ERROR, error)
        except SandboxError as error:
            return self._infrastructure(Failure.SANDBOX_ERROR, error)

    async def forget(self) -> None:
        """Lets the model free what it keeps for this rollout."""
        try:
            await self._model.forget(self._session)
        except ModelUnavailable as error:
            self.trouble = self.trouble or str(error)

    def _infrastructure(self, failure: Failure, error: Exception) -> Status:
        self.failures[failure] += 1
        self.trouble = str(error)
        return Status.INFRA_FAILED

    def _remaining_s(self) -> float:
        return self._budget.timeout_s - self._clock.active_s()

    async def _turn(self) -> Status | None:
        remaining = self._remaining_s()
        affordable = self._clock.affordable_tokens(remaining)
        if remaining <= 0 or affordable == 0 or len(self.context.turns) >= self._budget.max_turns:
            return Status.TIMEOUT
        allowance = min(self._policy.reserve, affordable or self._policy.reserve)
        deadline_s = remaining if affordable is None else None
        windows = self.context.windows_closed
        completion = spoken(await self._complete(allowance, deadline_s))
        tokens = len(completion.output_ids)
        if completion.finish_reason == "length" and not (tokens or completion.message.content):
            self._clock.generated(0, completion.gen_s)
            return Status.TIMEOUT  # the deadline came before a word was said
        turn = self.context.close(completion, 0.0)
        gen_s = self._clock.generated(len(turn.output_ids), completion.gen_s)
        wait_s = self._clock.waited(completion.wait_s)
        self.context.turns[-1] = replace(turn, gen_s=gen_s, wait_s=wait_s)
        self.failures[Failure.CONTEXT_WINDOW_OPENED] += self.context.windows_closed - windows
        cut = turn.finish_reason == "length"
        if cut:
            self.failures[Failure.OUTPUT_CUT] += 1
            if allowance < self._policy.reserve or self._remaining_s() <= 0:
                return Status.TIMEOUT
        return await self._act(completion.message, completion.problem, cut)

    async def _complete(self, allowance: int, deadline_s: float | None) -> Completion:
        async def ask(prompt: Prompt) -> Completion:
            return await self._model.complete(prompt, max_tokens=allowance, deadline_s=deadline_s)

        prompt = self.context.open()
        try:
            return await ask(prompt)
        except ContextLengthExceeded:
            shorter = self.context.open_shorter()
            if shorter is None:
                raise
            self.failures[Failure.CONTEXT_LENGTH_ERROR] += 1
            return await ask(shorter)

    async def _act(self, message: Message, problem: str, cut: bool) -> Status | None:
        """Runs the calls of a turn and tells what came of them."""
        answers: list[Message] = []
        caps: list[int] = []
        status: Status | None = None
        reading = not self.reading.complete
        most = max(1, min(_MOST_CALLS, self.context.room // _TOKENS_A_CALL - 1))
        for call in message.tool_calls[:most]:
            if self._remaining_s() <= 0:
                status = Status.TIMEOUT
                break
            outcome = await self._run(call)
            answers.append(Message("tool", outcome.text, tool_call_id=call.call_id))
            caps.append(self.context.room if outcome.whole else TOOL_OUTPUT_TOKENS)
            if outcome.ended:
                status = Status.DONE
                break
        if not status and (note := self._note(message, problem, cut, most)):
            answers.append(Message("user", note))
            caps.append(TOOL_OUTPUT_TOKENS)
        self.failures[Failure.OBSERVATION_TRUNCATED] += self.context.observe(answers, caps)
        if reading and self.reading.complete:
            self.context.pin()
        return status

    async def _run(self, call: ToolCall) -> Outcome:
        again = self._last_call and (call.name, call.arguments) == (
            self._last_call.name,
            self._last_call.arguments,
        )
        self._last_call, self._repeats = call, self._repeats + 1 if again else 1
        if self._repeats >= 3:
            self.failures[Failure.REPEATED_CALL] += 1
        timeout_s = self._budget.tool_timeout_s
        if self._clock.affordable_tokens(self._remaining_s()) is None:
            timeout_s = min(timeout_s, self._remaining_s())
        outcome = await self._tools.run(call, timeout_s)
        self.context.add_tool_seconds(self._clock.tool(outcome.seconds))
        if outcome.failure:
            self.failures[outcome.failure] += 1
        if call.name == "bash":
            self.progress.feed(len(self.context.turns), outcome.text)
        return outcome

    def _note(self, message: Message, problem: str, cut: bool, most: int) -> str:
        """What the agent is told of its own turn, empty when it was fine."""
        if len(message.tool_calls) > most:
            return f"Only the first {most} calls were run; make fewer at once."
        if message.tool_calls and not problem:
            return ""
        self.context.add_tool_seconds(self._clock.tool(0.0))
        if cut:
            return prompts.CUT
        failure = Failure.MALFORMED_TOOL_CALL if problem else Failure.NO_TOOL_CALL
        self.failures[failure] += 1
        return problem or prompts.NO_CALL
