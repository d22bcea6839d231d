"""The engine against sampling one token at a time from the whole context."""

import asyncio
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from klong_jax.core.errors import UserError
from klong_jax.engine.engine import Engine, EngineConfig
from klong_jax.llm.base import Completion, ContextLengthExceeded, Prompt
from klong_jax.models.config import DecoderConfig
from klong_jax.models.decoder import build
from klong_jax.text.chat import Chat
from klong_jax.text.tokenizer import train_tokenizer

CHAT = Chat(train_tokenizer(["one two three four"], 300))
MODEL = DecoderConfig(CHAT.tokenizer.vocab_size, 16, 2, 2, 1, 8, 32)
GRAPH, PARAMS = build(MODEL, 0)
LIMIT = 96


def make_engine(slots: int = 4, temperature: float = 1.0) -> Engine:
    engine = Engine(GRAPH, MODEL, CHAT, EngineConfig(slots, LIMIT, temperature, 8, 4))
    engine.load(PARAMS, 3)
    return engine


def prompt(length: int, seed: int = 0) -> Prompt:
    ids = np.random.default_rng(seed).integers(10, 250, length)
    return Prompt("s", (), tuple(int(i) for i in ids), 0)


async def speak(
    engine: Engine, slot: int, prompts: list[Prompt], max_tokens: int = 12, seed: int = 7
) -> list[Completion]:
    seat = engine.seat(slot, seed)
    return [await seat.complete(p, max_tokens=max_tokens, deadline_s=None) for p in prompts]


@jax.jit
def _logits(row: jax.Array) -> jax.Array:
    decoder = nnx.merge(GRAPH, PARAMS)
    return decoder.apply(row[None])[0] @ decoder.output_embedding.T


def last_logits(context: list[int]) -> jax.Array:
    """Logits after a context; padding behind it changes nothing in a causal model."""
    return _logits(jnp.asarray(context + [0] * (LIMIT - len(context))))[len(context) - 1]


def naive(
    context: list[int], max_tokens: int, turn: int, seed: int = 7
) -> tuple[list[int], list[float]]:
    """Samples with the whole context recomputed for each token."""
    key = jax.random.fold_in(jax.random.key(seed), turn)
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < max_tokens and (not tokens or tokens[-1] != CHAT.end_id):
        logits = last_logits(context + tokens)
        token = int(jax.random.categorical(jax.random.fold_in(key, len(tokens)), logits))
        logprobs.append(float(jax.nn.log_softmax(logits)[token]))
        tokens.append(token)
    return tokens, logprobs


def test_turns_equal_naive_sampling_whatever_is_cached() -> None:
    first = prompt(21)
    longer = Prompt("s", (), (*first.token_ids, *range(20, 33)), 0)  # extends what is cached
    moved = Prompt("s", (), (*first.token_ids[:9], *range(60, 81)), 0)  # a new window
    engine = make_engine()
    turns = asyncio.run(speak(engine, 2, [first, longer, moved, moved]))
    for number, (asked, got) in enumerate(zip([first, longer, moved, moved], turns, strict=True)):
        tokens, logprobs = naive(list(asked.token_ids), 12, number)
        assert list(got.output_ids) == tokens
        np.testing.assert_allclose(got.logprobs, logprobs, atol=1e-5)
        assert got.version == 3
    # 21 + 13 + 21 + 0 would be computed at best; the fed token counts once a turn.
    assert engine.computed_tokens < engine.prompt_tokens


def test_neighbours_and_their_timing_change_nothing() -> None:
    async def together(count: int) -> list[Completion]:
        engine = make_engine(slots=4)
        tasks = [speak(engine, slot, [prompt(10 + 7 * slot, slot)] * 2, seed=slot)
                 for slot in range(count)]  # fmt: skip
        turns = await asyncio.gather(*tasks)
        await engine.close()
        return turns[0]

    alone, crowded = asyncio.run(together(1)), asyncio.run(together(4))
    assert [t.output_ids for t in alone] == [t.output_ids for t in crowded]
    assert [t.logprobs for t in alone] == [t.logprobs for t in crowded]


def test_a_new_policy_forgets_what_was_cached() -> None:
    async def scenario() -> tuple[Completion, Completion]:
        engine = make_engine()
        await speak(engine, 0, [prompt(20)])
        engine.load(jax.tree.map(lambda leaf: leaf * 1.5, PARAMS), 4)
        changed = (await speak(engine, 0, [prompt(20)]))[0]
        fresh = make_engine()
        fresh.load(jax.tree.map(lambda leaf: leaf * 1.5, PARAMS), 4)
        return changed, (await speak(fresh, 0, [prompt(20)]))[0]

    changed, fresh = asyncio.run(scenario())
    assert changed.output_ids == fresh.output_ids
    assert changed.logprobs == fresh.logprobs


def test_temperature_zero_takes_the_likeliest_token() -> None:
    got = asyncio.run(speak(make_engine(temperature=0.0), 0, [prompt(15)], max_tokens=3))[0]
    context = list(prompt(15).token_ids)
    for token in got.output_ids:
        assert token == int(jnp.argmax(last_logits(context)))
        context.append(token)


def test_limits_are_kept() -> None:
    async def scenario() -> None:
        engine = make_engine()
        with pytest.raises(ContextLengthExceeded):
            await speak(engine, 0, [prompt(LIMIT)], max_tokens=1)
        cut = (await speak(engine, 0, [prompt(10)], max_tokens=2))[0]
        assert len(cut.output_ids) <= 2
        assert (cut.finish_reason == "length") == (cut.output_ids[-1] != CHAT.end_id)
        seat = engine.seat(1, 0)
        late = await seat.complete(prompt(10), max_tokens=80, deadline_s=0.0)
        assert late.finish_reason == "length"
        assert len(late.output_ids) <= engine.config.decode_steps
        with pytest.raises(UserError, match="slot 9"):
            engine.seat(9, 0)

    asyncio.run(scenario())


def test_a_mesh_changes_nothing() -> None:
    program = Path(__file__).with_name("engine_on_mesh.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
