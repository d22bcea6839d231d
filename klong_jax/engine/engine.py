"""Continuous batching over fixed slots, each the home of one rollout at a time.

A slot keeps the keys and values of what its rollout has said. The next turn's context shares a
prefix with it - the pinned prefix always, the whole history while the window lasts - and only the
rest is computed.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from klong_jax.core.errors import UserError
from klong_jax.engine.programs import CACHE_DIMENSIONS, Rows, compile_programs
from klong_jax.llm.base import Completion, ContextLengthExceeded, Prompt
from klong_jax.models.config import DecoderConfig, DTypes
from klong_jax.models.decoder import FLOAT32, Cache, Decoder, Params, empty_cache
from klong_jax.parallel.rules import active_rules, constrain, param_shardings, rounded_up
from klong_jax.text.dialect import Dialect

Scope = Callable[[], AbstractContextManager[object]]
"""Opens what programs are traced and run under: a mesh with its rules, kernels."""


@dataclass(frozen=True)
class EngineConfig:
    """The shape of an engine.

    Attributes:
        slots: Rollouts served at once.
        context_limit: Longest context, output included.
        temperature: Of the sampling.
        prefill_chunk: Prompt tokens a row and call.
        decode_steps: Tokens sampled a call.
    """

    slots: int
    context_limit: int
    temperature: float = 1.0
    prefill_chunk: int = 32
    decode_steps: int = 8


@dataclass
class _Job:
    slot: int
    prompt: list[int]
    max_tokens: int
    key: np.ndarray
    deadline_s: float | None
    answer: "asyncio.Future[_Sampled]"
    submitted: float
    admitted: float = 0.0
    pending: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def finished(self, end_id: int) -> bool:
        """Whether the turn is over."""
        spent = self.deadline_s is not None and time.monotonic() - self.admitted > self.deadline_s
        ended = bool(self.tokens) and self.tokens[-1] == end_id
        return ended or len(self.tokens) >= self.max_tokens or spent


@dataclass(frozen=True)
class _Sampled:
    tokens: list[int]
    logprobs: list[float]
    version: int
    gen_s: float
    wait_s: float


class Engine:
    """Samples for many rollouts at once; use it inside one event loop."""

    def __init__(
        self,
        graph: nnx.GraphDef[Decoder],
        model: DecoderConfig,
        chat: Dialect,
        config: EngineConfig,
        dtypes: DTypes = FLOAT32,
        scope: Scope = nullcontext,
    ) -> None:
        self.config = config
        self.chat = chat
        self._model = model
        self._prefill, self._sample = compile_programs(
            graph,
            end_id=chat.end_id,
            temperature=config.temperature,
            steps=config.decode_steps,
        )
        self._params: Params = None
        self._version = 0
        self._cached: list[list[int]] = [[] for _ in range(config.slots)]
        self._scope = scope
        with scope():
            # Rows beyond the slots stay idle.
            self._rows = rounded_up(config.slots, "batch")
            self._cache = _placed_cache(model, self._rows, config.context_limit, dtypes)
        self._jobs: dict[int, _Job] = {}
        self._queue: list[_Job] = []
        self._wake = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.prompt_tokens = 0
        self.computed_tokens = 0

    def load(self, params: Params, version: int) -> None:
        """Takes a new policy; what was cached under the old one is forgotten.

        Raises:
            RuntimeError: A turn is under way.
        """
        if self._jobs or self._queue:
            raise RuntimeError("the policy cannot change while turns are under way")
        with self._scope():
            mesh = jax.sharding.get_mesh()
            if not mesh.empty:
                params = jax.device_put(params, param_shardings(params, mesh, active_rules()))
        self._params, self._version = params, version
        self._cached = [[] for _ in range(self.config.slots)]

    def seat(self, slot: int, seed: int) -> "Seat":
        """A chat model bound to one slot and one stream of random numbers."""
        if not 0 <= slot < self.config.slots:
            raise UserError(f"engine: slot {slot} of {self.config.slots} does not exist.")
        return Seat(self, slot, seed)

    async def submit(
        self,
        slot: int,
        prompt: list[int],
        max_tokens: int,
        key: np.ndarray,
        deadline_s: float | None,
    ) -> _Sampled:
        """Samples one turn in a slot; turns of one slot must not overlap."""
        if len(prompt) + max_tokens > self.config.context_limit:
            raise ContextLengthExceeded(
                f"{len(prompt)} prompt and {max_tokens} output tokens exceed the context of "
                f"{self.config.context_limit}"
            )
        loop = asyncio.get_running_loop()
        job = _Job(
            slot, prompt, max_tokens, key, deadline_s, loop.create_future(), time.monotonic()
        )
        self._queue.append(job)
        self._wake.set()
        if self._runner is None or self._runner.done():
            self._runner = loop.create_task(self._run())
        return await job.answer

    async def close(self) -> None:
        """Stops the engine."""
        if self._runner:
            self._runner.cancel()
        self._thread.shutdown(wait=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                if not self._jobs and not self._queue:
                    self._wake.clear()
                    await self._wake.wait()
                self._admit()
                await loop.run_in_executor(self._thread, self._tick)
                self._settle()
        except Exception as error:  # whatever broke the device must reach every waiting rollout
            for job in [*self._jobs.values(), *self._queue]:
                if not job.answer.done():
                    job.answer.set_exception(error)
            self._jobs.clear()
            self._queue.clear()

    def _admit(self) -> None:
        for job in self._queue:
            if job.slot in self._jobs:
                raise RuntimeError(f"two turns at once in slot {job.slot}")
            cached = self._cached[job.slot]
            # The last prompt token is fed by the sampling program, so it never counts as cached.
            limit = min(len(cached), len(job.prompt) - 1)
            shared = next((i for i in range(limit) if cached[i] != job.prompt[i]), limit)
            self._cached[job.slot] = job.prompt[:shared]
            job.pending = job.prompt[shared:-1]
            job.admitted = time.monotonic()
            self.prompt_tokens += len(job.prompt)
            self.computed_tokens += len(job.pending) + 1
            self._jobs[job.slot] = job
        self._queue.clear()

    def _tick(self) -> None:
        # In a thread of its own, which knows nothing of what the others work under.
        with self._scope():
            if any(job.pending for job in self._jobs.values()):
                self._prefill_once()
            if any(not job.pending for job in self._jobs.values()):
                self._sample_once()

    def _prefill_once(self) -> None:
        width = self.config.prefill_chunk
        tokens = np.zeros((self._rows, width), np.int32)
        positions = np.full((self._rows, width), self.config.context_limit, np.int32)
        for slot, job in self._jobs.items():
            piece, job.pending = job.pending[:width], job.pending[width:]
            start = len(self._cached[slot])
            tokens[slot, : len(piece)] = piece
            positions[slot, : len(piece)] = np.arange(start, start + len(piece))
            self._cached[slot] = self._cached[slot] + piece
        self._cache = self._prefill(
            self._params, self._cache, jnp.asarray(tokens), jnp.asarray(positions)
        )

    def _sample_once(self) -> None:
        token, position, left, drawn = (np.zeros(self._rows, np.int32) for _ in range(4))
        key = np.zeros((self._rows, 2), np.uint32)
        ready = {slot: job for slot, job in self._jobs.items() if not job.pending}
        for slot, job in ready.items():
            said = job.tokens[-1] if job.tokens else job.prompt[-1]
            token[slot], position[slot] = said, len(self._cached[slot])
            left[slot], drawn[slot] = job.max_tokens - len(job.tokens), len(job.tokens)
            key[slot] = job.key
        rows = Rows(*(jnp.asarray(x) for x in (token, position, left, key, drawn)))
        self._cache, _, tokens, logprobs, sampled = self._sample(self._params, self._cache, rows)
        tokens, logprobs, sampled = jax.device_get((tokens, logprobs, sampled))
        for slot, job in ready.items():
            taken = sampled[:, slot]
            new = tokens[taken, slot].tolist()
            # The last token sampled is not in the cache yet; the one fed before it is.
            self._cached[slot] = self._cached[slot] + [int(token[slot]), *new[:-1]]
            job.tokens += new
            job.logprobs += logprobs[taken, slot].tolist()

    def _settle(self) -> None:
        now = time.monotonic()
        for slot, job in list(self._jobs.items()):
            if job.pending or not job.finished(self.chat.end_id):
                continue
            del self._jobs[slot]
            if not job.answer.done():
                job.answer.set_result(
                    _Sampled(
                        job.tokens,
                        job.logprobs,
                        self._version,
                        now - job.admitted,
                        job.admitted - job.submitted,
                    )
                )


def _placed_cache(model: DecoderConfig, rows: int, length: int, dtypes: DTypes) -> Cache:
    @jax.jit
    def make() -> Cache:
        keys, values = empty_cache(model, rows, length, dtypes)
        return constrain(keys, *CACHE_DIMENSIONS), constrain(values, *CACHE_DIMENSIONS)

    cache: Cache = make()
    return cache


class Seat:
    """One rollout's place at the engine: a `ChatModel` with its own slot and random numbers."""

    def __init__(self, engine: Engine, slot: int, seed: int) -> None:
        self._engine = engine
        self._slot = slot
        self._key = jax.random.key(seed)
        self._turn = 0

    async def complete(
        self, prompt: Prompt, *, max_tokens: int, deadline_s: float | None
    ) -> Completion:
        """Samples the next turn; the n-th turn of a seat always draws the same numbers."""
        key = np.asarray(jax.random.key_data(jax.random.fold_in(self._key, self._turn)))
        self._turn += 1
        sampled = await self._engine.submit(
            self._slot, list(prompt.token_ids), max_tokens, key, deadline_s
        )
        chat = self._engine.chat
        parsed = chat.parse(sampled.tokens)
        ended = bool(sampled.tokens) and sampled.tokens[-1] == chat.end_id
        return Completion(
            message=parsed.message,
            output_ids=tuple(sampled.tokens),
            logprobs=tuple(sampled.logprobs),
            finish_reason="stop" if ended else "length",
            version=sampled.version,
            gen_s=sampled.gen_s,
            wait_s=sampled.wait_s,
            problem=parsed.problem,
        )

    async def forget(self, session: str) -> None:
        """Nothing to free: the slot's next rollout overwrites it."""
