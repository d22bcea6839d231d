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
        lapse_rate: Share of turns in which it talks instead of acting, or starts to work before it
            has read everything. What the scaffold answers brings it back.
    """

    seed: int = 0
    mistake_rate: float = 0.0
    inspect_rate: float = 0.0
    lapse_rate: float = 0.0

    def chance(self, *what: object) -> float:
        """A number in [0, 1) that the seed and `what` fix."""
        digest = hashlib.sha256(repr((self.seed, *what)).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


@dataclass(frozen=True)
class Call:
    """A call of one tool."""

    name: str
    arguments: dict[str, Any]


_REMARK = "I go on."
_LOOK = Call("bash", {"command": "sh run.sh"})


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


def decide(messages: Sequence[dict[str, Any]], habits: Habits) -> Call | str:
    """The expert's next call, or a remark where it lapses, from the visible messages alone.

    Args:
        messages: A chat-completions conversation, or a window of one.
        habits: How it works.
    """
    task = next((m["content"] for m in messages if m["role"] == "user"), "")
    texts = [_answer(m) for m in messages]
    # Habits differ from paper to paper: what follows from the task's size alone could be learnt.
    paper = [text for text in texts if _SECTION.match(text)]
    last = texts[-1] if texts else ""
    unread = _unread(task, texts, messages)
    # Never twice in a row: it listens.
    listens = _lapsed(messages)
    if not listens and habits.chance(task, paper, len(messages), "lapse") < habits.lapse_rate:
        return _LOOK if unread and paper else _REMARK
    if unread:
        return Call("read_paper", {"section": unread})
    if "all done" in last.splitlines():
        return Call("end_task", {})
    if wrote := _WROTE.match(last):
        if habits.chance(task, paper, wrote[1], len(messages), "inspect") < habits.inspect_rate:
            return Call("read_file", {"path": f"c{wrote[1]}.sh"})
        return Call("bash", {"command": f"sh run.sh {wrote[1]}"})
    if coming := _NEXT.search(last):
        number, formula, constant = coming.groups()
        slip = 0
        # A first attempt may slip; the one after it never does.
        tried = {call.arguments.get("path") for call in _calls(messages)}
        first = "mismatch" not in last.splitlines() and f"c{number}.sh" not in tried
        if first and habits.chance(task, paper, number, "slip") < habits.mistake_rate:
            slip = 1 + int(habits.chance(task, paper, number, "digit") * 9)
        content = _Paper.of(texts).component(formula, constant, slip)
        return Call("write_file", {"path": f"c{number}.sh", "content": content})
    if inspected := _inspected(messages):
        return Call("bash", {"command": f"sh run.sh {inspected}"})
    return _LOOK


def _answer(message: dict[str, Any]) -> str:
    """The environment's words; an answer whose call is out of sight comes as the user's."""
    if message["role"] == "assistant":
        return ""
    text = str(message.get("content") or "").strip()
    return text.removeprefix("<tool_response>").removesuffix("</tool_response>").strip()


def _unread(task: str, texts: Sequence[str], messages: Sequence[dict[str, Any]]) -> int:
    """The first section to read; 0 once work has begun, even if the paper is out of sight."""
    sections = _SECTIONS.search(task)
    works = any(call != _LOOK and call.name != "read_paper" for call in _calls(messages))
    if sections is None or works or any(_NEXT.search(t) or _WROTE.match(t) for t in texts):
        return 0
    seen = {int(found[1]) for text in texts if (found := _SECTION.match(text))}
    unread = [n for n in range(1, int(sections[1]) + 1) if n not in seen]
    return unread[0] if unread else 0


def _lapsed(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether the last answer that is in sight was a lapse."""
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        return False
    return not answers[-1].get("tool_calls") or "unread" in _answer(messages[-1])


def _inspected(messages: Sequence[dict[str, Any]]) -> str:
    """The component whose file was just looked at, if that is still in sight."""
    for call in reversed(_calls(messages[-2:])):
        found = _COMPONENT.match(str(call.arguments.get("path", "")))
        if call.name == "read_file" and found:
            return found[1]
    return ""


def _calls(messages: Sequence[dict[str, Any]]) -> list[Call]:
    functions = [c["function"] for m in messages for c in m.get("tool_calls") or ()]
    return [Call(f["name"], json.loads(f["arguments"])) for f in functions]


@contextmanager
def serve_expert(habits: Habits) -> Iterator[str]:
    """Serves the expert on a free local port, in a thread of its own.

    Args:
        habits: How it works.

    Yields:
        The base URL, up to and including "/v1".
    """
    application = _application(habits)
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
        return web.json_response(_completion(body["messages"], decide(body["messages"], habits)))

    async def models(request: web.Request) -> web.Response:
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "klong"}
        return web.json_response({"object": "list", "data": [model]})

    application = web.Application(client_max_size=64 * 1024**2)
    application.router.add_post("/v1/chat/completions", complete)
    application.router.add_get("/v1/models", models)
    return application


def _completion(messages: list[dict[str, Any]], answer: Call | str) -> dict[str, Any]:
    """The wire form; usage is counted in words of four characters, as no tokenizer is about."""
    message: dict[str, Any] = {"role": "assistant", "content": answer}
    if isinstance(answer, Call):
        function = {"name": answer.name, "arguments": json.dumps(answer.arguments)}
        call = {"id": f"call_{len(messages)}", "type": "function", "function": function}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
    prompt = sum(len(str(m.get("content") or "")) for m in messages) // 4
    completion = len(json.dumps(message)) // 4
    finish = "tool_calls" if isinstance(answer, Call) else "stop"
    return {
        "id": f"chatcmpl-{len(messages)}",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }
