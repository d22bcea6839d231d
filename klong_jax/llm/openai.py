"""A chat model behind an OpenAI-compatible chat-completions endpoint."""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from klong_jax.core.errors import UserError
from klong_jax.llm.base import Completion, ContextLengthExceeded, ModelUnavailable, Prompt
from klong_jax.llm.wire import from_wire, to_wire

_TRANSIENT = frozenset({408, 409, 425, 429})
_TOO_LONG = ("context_length_exceeded", "maximum context length", "context length")
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class Prices:
    """Money per million tokens; cached prompt tokens have a price of their own."""

    prompt: float = 0.0
    cached: float = 0.0
    completion: float = 0.0


@dataclass
class Usage:
    """What a client has used so far; `prompt` includes `cached`."""

    requests: int = 0
    retries: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def cost(self, prices: Prices) -> float:
        """Money spent."""
        fresh = self.prompt - self.cached
        spent = fresh * prices.prompt + self.cached * prices.cached
        return (spent + self.completion * prices.completion) / 1e6


@dataclass
class _Retry(Exception):
    """A request failed in a way that another attempt may mend."""

    reason: str
    after_s: float | None = None


class OpenAIChat:
    """A remote model; open it with `async with`. It belongs to one event loop.

    It gives no tokens: `Completion.output_ids` is empty, and the agent tokenises the message in its
    own dialect. The caller's prompt tokens are not sent either, only the messages.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        tools: Sequence[dict[str, Any]] = (),
        temperature: float = 1.0,
        concurrency: int = 16,
        max_retries: int = 6,
        timeout_s: float = 600.0,
        prices: Prices | None = None,
        seed: int = 0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Describes the model; nothing connects before the first request.

        Args:
            base_url: Up to and including "/v1".
            model: The model's name there.
            api_key_env: Environment variable that holds the key; None sends none.
            tools: Tools as the protocol declares them.
            temperature: Sampling temperature.
            concurrency: Requests at once.
            max_retries: Attempts after the first before the model counts as unavailable.
            timeout_s: Seconds one request may take.
            prices: What tokens cost.
            seed: Of the jitter of waiting.
            sleep: Waits between attempts.

        Raises:
            UserError: The variable is not set.
        """
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._model, self._key_env = model, api_key_env
        self._tools, self._temperature = list(tools), temperature
        self._max_retries, self._timeout_s = max_retries, timeout_s
        self.usage, self.prices = Usage(), prices or Prices()
        self._random, self._sleep = random.Random(seed), sleep
        self._places = asyncio.Semaphore(concurrency)
        headers = {}
        if api_key_env is not None:
            key = os.environ.get(api_key_env, "")
            if not key:
                raise UserError(f"{api_key_env}: not set; put the key of {base_url} into it.")
            headers["Authorization"] = f"Bearer {key}"
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._http = httpx.AsyncClient(headers=headers, limits=limits, timeout=None)

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the connections."""
        await self._http.aclose()

    @property
    def cost(self) -> float:
        """Money spent so far."""
        return self.usage.cost(self.prices)

    async def forget(self, session: str) -> None:
        """Nothing is kept here."""

    async def complete(
        self, prompt: Prompt, *, max_tokens: int, deadline_s: float | None
    ) -> Completion:
        """Asks for one turn; waiting for a place and between attempts is not generation time.

        Raises:
            ContextLengthExceeded: The endpoint refuses the context as too long.
            ModelUnavailable: The attempts are used up, or the answer is not the protocol's.
            UserError: The endpoint refuses the key.
        """
        body: dict[str, Any] = {
            "model": self._model,
            "messages": to_wire(prompt.messages),
            "max_tokens": max_tokens,
            "temperature": self._temperature,
        }
        if self._tools:
            body["tools"] = self._tools
        begin, waits = time.perf_counter(), self._places.locked()
        async with self._places:
            answer, gen_s, retried = await self._insist(body, deadline_s)
        # Exactly zero where nothing was waited for, so that equal runs give equal records.
        wait_s = time.perf_counter() - begin - gen_s if waits or retried else 0.0
        return self._completion(answer, gen_s, max(0.0, wait_s))

    async def _insist(
        self, body: dict[str, Any], deadline_s: float | None
    ) -> tuple[Any, float, bool]:
        """Returns the answer (None past the deadline), its seconds, and whether one was retried."""
        for attempt in range(self._max_retries + 1):
            begin = time.perf_counter()
            self.usage.requests += 1
            try:
                answer = await self._ask(body, deadline_s)
                return answer, time.perf_counter() - begin, attempt > 0
            except _Retry as failure:
                if attempt == self._max_retries:
                    raise ModelUnavailable(
                        f"{self._url}: gave up after {attempt + 1} attempts ({failure.reason})."
                    ) from failure
                self.usage.retries += 1
                # Full jitter, so that many rollouts do not come back at once.
                wait_s = self._random.uniform(0.5, 1.0) * min(_LONGEST_WAIT_S, 2.0**attempt)
                await self._sleep(wait_s if failure.after_s is None else failure.after_s)
        raise AssertionError("unreachable")

    async def _ask(self, body: dict[str, Any], deadline_s: float | None) -> Any:
        tight = deadline_s is not None and deadline_s < self._timeout_s
        try:
            async with asyncio.timeout(deadline_s if tight else self._timeout_s):
                response = await self._http.post(self._url, json=body)
        except TimeoutError:
            if tight:
                return None
            raise _Retry(f"no answer within {self._timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise _Retry(f"{type(error).__name__}: {error}") from None
        if response.status_code >= 400:
            self._refuse(response)
        try:
            return response.json()
        except ValueError:
            raise _Retry("the answer is not JSON") from None

    def _refuse(self, response: httpx.Response) -> None:
        status, text = response.status_code, response.text[:2000]
        if status in _TRANSIENT or status >= 500:
            raise _Retry(f"status {status}", _retry_after(response.headers.get("Retry-After")))
        if status in (401, 403):
            remedy = f"check {self._key_env}" if self._key_env else "name a variable in api_key_env"
            raise UserError(f"{self._url}: refuses the key (status {status}); {remedy}.")
        if status in (400, 413, 422) and any(mark in text.lower() for mark in _TOO_LONG):
            raise ContextLengthExceeded(f"{self._url}: the context is too long for {self._model}.")
        raise ModelUnavailable(f"{self._url}: status {status}: {text[:300]}")

    def _completion(self, answer: Any, gen_s: float, wait_s: float) -> Completion:
        if answer is None:
            message, problem = from_wire({})
            return Completion(message, (), finish_reason="length", gen_s=gen_s, wait_s=wait_s)
        try:
            choice = answer["choices"][0]
            message, problem = from_wire(choice["message"])
            self._count(answer.get("usage") or {})
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ModelUnavailable(
                f"{self._url}: the answer is not a chat completion ({error!r})."
            ) from None
        finish = "length" if choice.get("finish_reason") == "length" else "stop"
        return Completion(
            message, (), finish_reason=finish, gen_s=gen_s, wait_s=wait_s, problem=problem
        )

    def _count(self, usage: dict[str, Any]) -> None:
        self.usage.prompt += int(usage.get("prompt_tokens") or 0)
        self.usage.completion += int(usage.get("completion_tokens") or 0)
        details = usage.get("prompt_tokens_details") or {}
        self.usage.cached += int(details.get("cached_tokens") or 0)


def _retry_after(header: str | None) -> float | None:
    """Seconds the server asks to wait; a date, which is rare, is passed over."""
    try:
        return min(_LONGEST_WAIT_S, max(0.0, float(header or "")))
    except ValueError:
        return None
