"""The five tools, and what running one of them says and costs."""

import time
from dataclasses import dataclass, field
from typing import Any

from klong_jax.agent.failures import Failure
from klong_jax.agent.reading import Reading
from klong_jax.core.message import ToolCall
from sandbox.client import (
    ExecResult,
    Sandbox,
    SandboxError,
    SandboxGated,
    SandboxUnfinished,
)


@dataclass(frozen=True)
class Tool:
    """What a model is told of a tool.

    Attributes:
        name: Its name.
        description: What it does.
        arguments: Argument name to JSON type; all are required.
    """

    name: str
    description: str
    arguments: dict[str, str] = field(default_factory=dict)

    def schema(self) -> dict[str, Any]:
        """The tool as the chat-completions protocol declares it."""
        properties = {name: {"type": kind} for name, kind in self.arguments.items()}
        parameters = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": parameters,
        }
        return {"type": "function", "function": function}


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("read_paper", "Read a section of the paper, by number.", {"section": "integer"}),
        Tool("read_file", "Read a file of the workspace.", {"path": "string"}),
        Tool(
            "write_file",
            "Write a file of the workspace.",
            {"path": "string", "content": "string"},
        ),
        Tool("bash", "Run a shell command in the workspace.", {"command": "string"}),
        Tool("end_task", "End the task when everything is done."),
    )
}


def tool_schemas() -> list[dict[str, Any]]:
    """All tools, as the chat-completions protocol declares them."""
    return [tool.schema() for tool in TOOLS.values()]


@dataclass(frozen=True)
class Outcome:
    """What a call came to.

    Attributes:
        text: The tool's answer.
        failure: What went wrong, if anything.
        seconds: Measured seconds of work.
        whole: Whether the answer is a text that should be shown whole where there is room.
        ended: Whether the task ended by it.
    """

    text: str
    failure: Failure | None = None
    seconds: float = 0.0
    whole: bool = False
    ended: bool = False


class Toolbox:
    """Runs an agent's calls; what the agent got wrong is an answer, never an exception."""

    def __init__(self, sandbox: Sandbox, reading: Reading) -> None:
        self._sandbox = sandbox
        self._reading = reading

    async def run(self, call: ToolCall, timeout_s: float) -> Outcome:
        """Runs one call.

        Args:
            call: What the agent asks for.
            timeout_s: Wall-clock seconds a command may take.

        Raises:
            SandboxError: The sandbox failed, not the agent.
        """
        if problem := _problem(call):
            return problem
        if call.name == "read_paper":
            section = self._reading.number(call.arguments["section"])
            if section is None:
                return Outcome(self._reading.numbers(), Failure.BAD_ARGUMENTS)
            text = await self._sandbox.take_part(section)
            self._reading.read.add(section)
            return Outcome(text, whole=True)
        if call.name == "end_task":
            return await self._end_task(timeout_s)
        if not self._reading.complete:
            return Outcome(self._reading.reminder(), Failure.REFUSED_BEFORE_READING)
        if call.name == "bash":
            return await self._bash(call.arguments["command"], timeout_s)
        begin = time.perf_counter()
        try:
            text = await self._file(call)
        except SandboxError as error:
            if error.infra:
                raise
            return Outcome(str(error), Failure.TOOL_ERROR, time.perf_counter() - begin)
        return Outcome(text, seconds=time.perf_counter() - begin)

    async def _file(self, call: ToolCall) -> str:
        path: str = call.arguments["path"]
        if call.name == "write_file":
            await self._sandbox.write(path, call.arguments["content"])
            return f"wrote {path}"
        return (await self._sandbox.read(path)).decode("utf-8", "replace")

    async def _bash(self, command: str, timeout_s: float) -> Outcome:
        try:
            result = await self._sandbox.exec(command, timeout_s=timeout_s)
        except SandboxError as error:
            if error.infra:
                raise
            return Outcome(str(error), Failure.TOOL_ERROR)
        text = _said(result)
        failure = None
        if result.timed_out:
            text = f"{text}\ntimed out after {timeout_s:.3g} s".strip()
            failure = Failure.TOOL_TIMEOUT
        elif result.exit_code != 0:
            text = text or f"(exit code {result.exit_code})"
            failure = Failure.TOOL_ERROR
        return Outcome(text, failure, result.duration_s)

    async def _end_task(self, timeout_s: float) -> Outcome:
        if not self._reading.complete:
            return Outcome(self._reading.reminder(), Failure.REFUSED_END)
        try:
            check = await self._sandbox.end(timeout_s=timeout_s)
        except SandboxUnfinished as error:
            failed = ExecResult(**error.facts["check"])
            why = next(iter(_said(failed).splitlines()), str(error))
            return Outcome(f"not finished: {why}", Failure.REFUSED_END, failed.duration_s)
        except SandboxGated as error:
            return Outcome(str(error), Failure.REFUSED_END)
        return Outcome("ended", seconds=check.duration_s if check else 0.0, ended=True)


def _said(result: ExecResult) -> str:
    parts = (result.stdout.strip(), result.stderr.strip())
    text = "\n".join(part for part in parts if part)
    # Half a surrogate pair can come over JSON and cannot be encoded.
    return text.encode("utf-8", "replace").decode()


def _problem(call: ToolCall) -> Outcome | None:
    tool = TOOLS.get(call.name)
    if tool is None:
        names = ", ".join(TOOLS)
        return Outcome(f"There is no tool {call.name[:40]!r}; use {names}.", Failure.UNKNOWN_TOOL)
    if set(call.arguments) != set(tool.arguments):
        wanted = ", ".join(tool.arguments) or "no arguments"
        return Outcome(f"{call.name} takes {wanted}.", Failure.BAD_ARGUMENTS)
    for name, kind in tool.arguments.items():
        if kind == "string" and not isinstance(call.arguments[name], str):
            return Outcome(f"{call.name}: {name} must be a string.", Failure.BAD_ARGUMENTS)
    return None
