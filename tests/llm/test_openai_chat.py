"""The chat-completions client against a real socket that misbehaves in known ways."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
from aiohttp import web

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message, ToolCall
from klong_jax.llm.base import Completion, ContextLengthExceeded, ModelUnavailable, Prompt
from klong_jax.llm.openai import OpenAIChat, Prices

PROMPT = Prompt("s", (Message("user", "hi"),), (1, 2), 1)
Reply = tuple[int, Any, dict[str, str]]


def said(message: dict[str, Any], finish: str = "stop") -> Reply:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 60},
    }
    choice = {"message": {"role": "assistant", **message}, "finish_reason": finish}
    return 200, {"choices": [choice], "usage": usage}, {}


def call(arguments: str) -> dict[str, Any]:
    return {"id": "x", "type": "function", "function": {"name": "bash", "arguments": arguments}}


def ask(
    replies: Sequence[Reply],
    then: Callable[[OpenAIChat], Awaitable[Any]] | None = None,
    prompt: Prompt = PROMPT,
    **options: Any,
) -> tuple[Any, list[dict[str, Any]], OpenAIChat, list[float]]:
    """Asks a server that gives the replies in order; the last one again and again."""
    seen: list[dict[str, Any]] = []
    slept: list[float] = []
    left: Iterator[Reply] = iter(replies)

    async def handle(request: web.Request) -> web.Response:
        seen.append(await request.json())
        status, body, headers = next(left, replies[-1])
        return web.json_response(body, status=status, headers=headers)

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def run() -> tuple[Any, OpenAIChat]:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", handle)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        try:
            async with OpenAIChat(url, "m", sleep=sleep, **options) as model:
                if then:
                    return await then(model), model
                return await model.complete(prompt, max_tokens=5, deadline_s=None), model
        finally:
            await runner.cleanup()

    result, model = asyncio.run(run())
    return result, seen, model, slept


def test_calls_usage_and_cost() -> None:
    reply = said({"content": None, "tool_calls": [call('{"command": "ls"}')]}, "tool_calls")
    prices = Prices(prompt=1.0, cached=0.1, completion=2.0)
    done, seen, model, _ = ask([reply], prices=prices, tools=[{"type": "function"}])
    assert isinstance(done, Completion)
    assert done.message.tool_calls == (ToolCall("bash", {"command": "ls"}, "x"),)
    assert (done.finish_reason, done.problem, done.output_ids) == ("stop", "", ())
    assert (seen[0]["max_tokens"], seen[0]["tools"]) == (5, [{"type": "function"}])
    assert model.cost == pytest.approx((40 * 1.0 + 60 * 0.1 + 10 * 2.0) / 1e6)


def test_retries_honour_retry_after_and_back_off() -> None:
    replies = [
        (429, {}, {"Retry-After": "0"}),
        (503, {}, {}),
        (500, {}, {}),
        said({"content": "a"}),
    ]
    done, seen, model, slept = ask(replies)
    assert done.message.content == "a"
    assert (len(seen), model.usage.retries) == (4, 3)
    assert slept[0] == 0.0
    assert 1.0 <= slept[1] <= 2.0 <= slept[2] <= 4.0
    assert slept == ask(replies)[3], "the jitter is seeded"


def test_gives_up_as_unavailable() -> None:
    with pytest.raises(ModelUnavailable, match="3 attempts"):
        ask([(503, {}, {})], max_retries=2)


def test_nobody_listening_is_unavailable() -> None:
    async def run() -> None:
        async with OpenAIChat("http://127.0.0.1:9/v1", "m", max_retries=0) as model:
            await model.complete(PROMPT, max_tokens=5, deadline_s=None)

    with pytest.raises(ModelUnavailable, match=r"127\.0\.0\.1:9"):
        asyncio.run(run())


@pytest.mark.parametrize("body", [[], {"choices": []}, {"choices": [{"message": {"content": 3}}]}])
def test_an_answer_of_another_shape_is_unavailable(body: Any) -> None:
    with pytest.raises(ModelUnavailable, match="not a chat completion"):
        ask([(200, body, {})])


def test_context_length() -> None:
    error = {"error": {"code": "context_length_exceeded", "message": "too long"}}
    with pytest.raises(ContextLengthExceeded):
        ask([(400, error, {})])
    with pytest.raises(ModelUnavailable, match="bad thing"):
        ask([(400, {"error": {"message": "bad thing"}}, {})])


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(UserError, match="SOME_KEY"):
        ask([said({"content": "a"})], api_key_env="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "k")
    with pytest.raises(UserError, match="check SOME_KEY"):
        ask([(401, {}, {})], api_key_env="SOME_KEY")


@pytest.mark.parametrize("arguments", ["{broken", "[1]"])
def test_malformed_arguments_are_told_and_kept_as_said(arguments: str) -> None:
    done, *_ = ask([said({"content": "hm", "tool_calls": [call(arguments)]})])
    assert not done.message.tool_calls
    assert "JSON" in done.problem
    assert arguments in done.message.content


def test_an_answer_without_its_call_is_shown_as_the_users_words() -> None:
    asked = Message("assistant", "", tool_calls=(ToolCall("bash", {"command": "ls"}, "c1"),))
    messages = (
        Message("user", "task"),
        Message("tool", "orphan", tool_call_id="c0"),
        asked,
        Message("tool", "paired", tool_call_id="c1"),
    )
    _, seen, *_ = ask([said({"content": "a"})], prompt=Prompt("s", messages, (1,), 1))
    _, orphan, assistant, paired = seen[0]["messages"]
    assert orphan == {"role": "user", "content": "<tool_response>\norphan\n</tool_response>"}
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"command": "ls"}
    assert (paired["role"], paired["tool_call_id"]) == ("tool", "c1")


def test_no_more_requests_at_once_than_allowed() -> None:
    async def then(model: OpenAIChat) -> list[Completion]:
        many = (model.complete(PROMPT, max_tokens=5, deadline_s=None) for _ in range(6))
        return list(await asyncio.gather(*many))

    done, seen, *_ = ask([said({"content": "a"})], then, concurrency=1)
    assert len(seen) == 6
    # The first had its place at once and so waited for exactly nothing; the others did wait.
    assert sum(completion.wait_s > 0 for completion in done) == 5


def test_a_deadline_cuts() -> None:
    async def then(model: OpenAIChat) -> Completion:
        return await model.complete(PROMPT, max_tokens=5, deadline_s=0.0)

    done, *_ = ask([said({"content": "a"})], then)
    assert (done.finish_reason, done.message.content) == ("length", "")
