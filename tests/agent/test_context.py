"""The live context obeys the policy: online windows are the splitter's, whatever happens."""

import numpy as np
from agent_helpers import chat
from hypothesis import given, settings
from hypothesis import strategies as st

from klong_jax.agent.context import Context
from klong_jax.agent.observation import fit
from klong_jax.agent.progress import Progress
from klong_jax.core.message import Message
from klong_jax.core.trajectory import Status, Trajectory
from klong_jax.llm.base import Completion
from klong_jax.splitting.policy import ContextPolicy, split
from klong_jax.text.dialect import cut_marker

OPENING = (Message("system", "be"), Message("user", "do"))
TURN = st.tuples(st.integers(1, 40), st.lists(st.integers(0, 200), max_size=3), st.booleans())


@settings(max_examples=150, deadline=None)
@given(
    limit=st.integers(160, 400),
    overlap=st.integers(0, 80),
    overlap_turns=st.none() | st.integers(0, 6),
    fade=st.sampled_from([(), (40,), (60, 40, 32)]),
    turns=st.lists(TURN, min_size=1, max_size=25),
    pin_at=st.integers(0, 25),
)
def test_online_windows_are_the_splitters(
    limit: int,
    overlap: int,
    overlap_turns: int | None,
    fade: tuple[int, ...],
    turns: list[tuple[int, list[int], bool]],
    pin_at: int,
) -> None:
    policy = ContextPolicy(limit, overlap, 40, overlap_turns, fade, cut_marker(chat()))
    context = Context(chat(), policy, "s", OPENING, "task t")
    for number, (output_len, words, cut) in enumerate(turns):
        prompt = context.open()
        assert len(prompt.token_ids) + policy.reserve <= limit
        ids = tuple(range(20, 20 + output_len))
        finish = "length" if cut else "stop"
        context.close(Completion(Message("assistant", "x"), ids, finish_reason=finish), 0.0)
        span = context.spans[-1]
        stream = [t for turn in context.turns for t in turn.suffix_ids + turn.output_ids]
        seen = span.take(np.array(stream), span.marker).tolist()
        assert seen[: span.length - output_len] == list(prompt.token_ids)
        assert prompt.messages[: context.pinned_messages] == tuple(
            context.messages[: context.pinned_messages]
        )
        # The window's messages say what its tokens say, sampled turns and faded texts apart.
        visible = chat().tokenizer.decode(prompt.token_ids)
        assert span.left_out or all(
            m.content in visible for m in prompt.messages if m.role != "assistant"
        )
        context.observe([Message("tool", "word " * n) for n in words], [4096] * len(words))
        if number == pin_at:
            context.pin()
    taken = tuple(context.turns)
    prefix_len = context.spans[0].prefix_len
    assert split(taken, prefix_len, policy) == context.spans
    trajectory = Trajectory("t", "t", (), taken, context.spans, Status.DONE, 0.0, {})
    trained = sum(int(window.trained_mask.sum()) for window in trajectory.windows())
    assert trained == sum(len(turn.output_ids) for turn in taken)


@settings(max_examples=50)
@given(
    overlap_turns=st.none() | st.integers(0, 6),
    fade=st.sampled_from([(), (36, 32)]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
)
def test_a_shorter_context_has_at_most_half_the_history(
    overlap_turns: int | None, fade: tuple[int, ...], lengths: list[int]
) -> None:
    policy = ContextPolicy(300, 90, 40, overlap_turns, fade)
    context = Context(chat(), policy, "s", OPENING, "task t")
    for length in lengths:
        context.open()
        context.close(Completion(Message("assistant", "x"), tuple(range(20, 20 + length))), 0.0)
        context.observe([Message("tool", "word " * (length % 3))], [100])
    full = context.open()
    said = chat().environment_ids([context.messages[-1]], after_output=True)
    bare = full.prefix_len + len(said) + len(chat().prompt_ids)
    history = len(full.token_ids) - bare
    shorter = context.open_shorter()
    assert (shorter is None) == (history == 0)
    if shorter is not None:
        assert len(shorter.token_ids) - bare <= history // 2


@given(text=st.text(max_size=400), limit=st.integers(-3, 120))
def test_a_text_fits_its_room(text: str, limit: int) -> None:
    shown = fit(text, limit, chat().tokenizer)
    encoded = chat().tokenizer.encode(text, specials=False)
    assert len(chat().tokenizer.encode(shown, specials=False)) <= max(0, limit)
    if len(encoded) <= limit and len(text) <= 16 * limit:
        assert shown == text


def test_a_huge_text_is_not_encoded_whole() -> None:
    shown = fit("x" * 50_000_000, 50, chat().tokenizer)
    assert shown.startswith("x")
    assert len(shown) < 1000


def test_a_remote_answer_longer_than_the_reserve_is_placed_as_the_splitter_places_it() -> None:
    policy = ContextPolicy(limit=300, overlap=60, reserve=40)
    context = Context(chat(), policy, "s", OPENING, "task t")
    for content in ("x " * 10, "y " * 60, "z " * 400):
        context.open()
        context.close(Completion(Message("assistant", content), ()), 0.0)
        context.observe([Message("user", "go on")], [100])
    assert [turn.finish_reason for turn in context.turns] == ["stop", "stop", "length"]
    assert len(context.turns[1].output_ids) > policy.reserve
    assert split(context.turns, context.spans[0].prefix_len, policy) == context.spans


def test_progress_never_goes_back() -> None:
    progress = Progress("read sections 1 to 4, then build components 1 to 40: go")
    for turn, output in enumerate(
        [
            "next 1;a;b",
            "hello",
            "ok 10\nnext 11;a;b",
            "mismatch\nnext 3;a;b",
            "12/40",
            "57%",
            "400%",
        ]
    ):
        progress.feed(turn, output)
    assert progress.points == [(0, 0.0), (2, 0.25), (4, 0.3), (5, 0.57)]
    progress.feed(9, "ok 40\nall done\n")
    assert progress.estimate == 1.0
    assert Progress("x").estimate is None
