"""The scripted expert for Replicate, behind a real chat-completions endpoint.

It knows what the messages of a request say and nothing else: no state, no answer key. So what it
does is what a model could learn to do from the same context, and where the paper is out of sight it
guesses, and fails, as it should. Its slips are a hash of (seed, task, component, messages seen), so
they do not depend on how many rollouts ask at once.
"""

import asyncio
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

MODEL = "replicate-expert"
_SECTIONS = re.compile(r"\bsections 1 to (\d+)")
_SECTION = re.compile(r"(\d+) [A-Z]")
_NUMBER = re.compile(r"^([a-z]+)=(\d+)$", re.MULTILINE)
_RESULT = re.compile(r"^Print each result as echo (\$.+)$", re.MULTILINE)
_NEXT = re.compile(r"^next (\d+);([a-z]+);([a-z]+)$", re.MULTILINE)
_WROTE = re.compile(r"^wrote c(\d+)\.sh$")
_COMPONENT = re.compile(r"^c(\d+)\.sh$")


@dataclass(frozen=True)
class Habits:
    """How the expert works.

    Attributes:
        seed: Chooses where it slips.
        mistake_rate: Share of components first written with a wrong digit.
        inspect_rate: Share of written files that it looks at before running them.
    """

    seed: int = 0
    mistake_rate: float = 0.0
    inspect_rate: float = 0.0

    def chance(self, *what: object) -> float:
        """A number in [0, 1) that the seed and `what` fix."""
        digest = hashlib.sha256(repr((self.seed, *what)).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


@dataclass(frozen=True)
class _Call:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class _Paper:
    """What the visible messages say of the paper."""

    numbers: dict[str, str]
    result: str

    @staticmethod
    def of(texts: Sequence[str]) -> "_Paper":
        numbers: dict[str, str] = {}
        result = ""
        for text in texts:
            # A section begins with its number and title; nothing else in a window does.
            if _SECTION.match(text):
                numbers.update(_NUMBER.findall(text))
                result = next(iter(_RESULT.findall(text)), result)
        return _Paper(numbers, result)

    def component(self, formula: str, constant: str, slip: int) -> str:
        """The component's script; what is out of sight is guessed, a slip moves the constant."""
        value = (int(self.numbers.get(constant, "1")) + slip) % 10
        return (
            f"x=$1;{constant}={value};c=${constant};"
            f"{formula}={self.numbers.get(formula, '1')};f=${formula};"
            f"echo {self.result or '$((x*f*c))'}"
        )


def decide(messages: Sequence[dict[str, Any]], habits: Habits) -> tuple[str, dict[str, Any]]:
    """The expert's next call, from the visible messages alone.

    Args:
        messages: A chat-completions conversation, or a window of one.
        habits: How it works.

    Returns:
        The tool's name and its arguments.
    """
    call = _decide(messages, habits)
    return call.name, call.arguments


def _decide(messages: Sequence[dict[str, Any]], habits: Habits) -> _Call:
    task = next((m["content"] for m in messages if m["role"] == "user"), "")
    texts = [_answer(m) for m in messages]
    # Habits differ from paper to paper: what follows from the task's size alone could be learnt.
    paper = [text for text in texts if _SECTION.match(text)]
    if (section := _unread(task, texts, messages)) is not None:
        return _Call("read_paper", {"section": section})
    last = texts[-1] if texts else ""
    if "all done" in last.splitlines():
        return _Call("end_task", {})
    if wrote := _WROTE.match(last):
        if habits.chance(task, paper, wrote[1], len(messages), "inspect") < habits.inspect_rate:
            return _Call("read_file", {"path": f"c{wrote[1]}.sh"})
        return _Call("bash", {"command": f"sh run.sh {wrote[1]}"})
    if coming := _NEXT.search(last):
        number, formula, constant = coming.groups()
        slip = 0
        # A first attempt may slip; the one after it never does.
        tried = {arguments.get("path") for _, arguments in _calls(messages)}
        first = "mismatch" not in last.splitlines() and f"c{number}.sh" not in tried
        if first and habits.chance(task, paper, number, "slip") < habits.mistake_rate:
            slip = 1 + int(habits.chance(task, paper, number, "digit") * 9)
        content = _Paper.of(texts).component(formula, constant, slip)
        return _Call("write_file", {"path": f"c{number}.sh", "content": content})
    if inspected := _inspected(messages):
        return _Call("bash", {"command": f"sh run.sh {inspected}"})
    return _Call("bash", {"command": "sh run.sh"})


def _answer(message: dict[str, Any]) -> str:
    """The environment's words; an answer whose call is out of sight comes as the user's."""
    if message["role"] == "assistant":
        return ""
    text = str(message.get("content") or "").strip()
    return text.removeprefix("<tool_response>").removesuffix("</tool_response>").strip()


def _unread(task: str, texts: Sequence[str], messages: Sequence[dict[str, Any]]) -> int | None:
    """The first section to read; None once work has begun, even if the paper is out of sight."""
    sections = _SECTIONS.search(task)
    works = any(name not in ("read_paper", "") for name, _ in _calls(messages))
    if sections is None or works or _NEXT.search(texts[-1]) or _WROTE.match(texts[-1]):
        return None
    seen = {int(found[1]) for text in texts if (found := _SECTION.match(text))}
    unread = [n for n in range(1, int(sections[1]) + 1) if n not in seen]
    return unread[0] if unread else None


def _inspected(messages: Sequence[dict[str, Any]]) -> str:
    """The component whose file was just looked at, if that is still in sight."""
    for name, arguments in reversed(_calls(messages[-2:])):
        found = _COMPONENT.match(str(arguments.get("path", "")))
        if name == "read_file" and found:
            return found[1]
    return ""


def _calls(messages: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    functions = [c["function"] for m in messages for c in m.get("tool_calls") or ()]
    return [(f["name"], json.loads(f["arguments"])) for f in functions]


@contextmanager
def serve_expert(
    *, seed: int = 0, mistake_rate: float = 0.0, inspect_rate: float = 0.0
) -> Iterator[str]:
    """Serves the expert on a free local port, in a thread of its own.

    Args:
        seed: Chooses where it slips.
        mistake_rate: Share of components first written with a wrong digit.
        inspect_rate: Share of written files looked at before they are run.

    Yields:
        The base URL, up to and including "/v1".
    """
    application = _application(Habits(seed, mistake_rate, inspect_rate))
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(application, access_log=None)

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(runner.addresses[0][1])

    thread = threading.Thread(target=loop.run_forever, name="expert", daemon=True)
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(start(), loop).result()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _application(habits: Habits) -> web.Application:
    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        name, arguments = decide(body["messages"], habits)
        return web.json_response(_completion(body["messages"], name, arguments))

    async def models(request: web.Request) -> web.Response:
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "klong"}
        return web.json_response({"object": "list", "data": [model]})

    application = web.Application(client_max_size=64 * 1024**2)
    application.router.add_post("/v1/chat/completions", complete)
    application.router.add_get("/v1/models", models)
    return application


def _completion(
    messages: list[dict[str, Any]], name: str, arguments: dict[str, Any]
) -> dict[str, Any]:
    """The wire form; usage is counted in words of four characters, as no tokenizer is about."""
    spelled = json.dumps(arguments)
    prompt = sum(len(str(message.get("content") or "")) for message in messages) // 4
    completion = (len(name) + len(spelled)) // 4
    function = {"name": name, "arguments": spelled}
    call = {"id": f"call_{len(messages)}", "type": "function", "function": function}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {
        "id": f"chatcmpl-{len(messages)}",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }
