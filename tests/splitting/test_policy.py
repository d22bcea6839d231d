"""The context policy as properties: what DESIGN calls "a window is what the agent saw"."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.core.trajectory import Turn, cut_window, token_stream
from klong_jax.splitting.policy import ContextOverflow, ContextPolicy, WindowTracker, split


@st.composite
def recordings(draw: st.DrawFn) -> tuple[tuple[Turn, ...], int, ContextPolicy]:
    """Turns with distinct tokens, a pinned prefix that ends at a turn, and a policy that fits."""
    lengths = draw(
        st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=30)
    )
    turns, token = [], 0
    for suffix, output in lengths:
        turns.append(
            Turn(
                tuple(range(token, token + suffix)),
                tuple(range(token + suffix, token + suffix + output)),
            )
        )
        token += suffix + output
    pinned_turns = draw(st.integers(0, min(3, len(turns) - 1)))
    prefix = sum(len(t.suffix_ids) + len(t.output_ids) for t in turns[:pinned_turns])
    # The prefix may end inside a suffix: after what was read, before the generation prompt.
    prefix += draw(st.integers(0, len(turns[pinned_turns].suffix_ids) - 1))
    reserve = draw(st.integers(8, 12))
    limit = prefix + 12 + reserve + draw(st.integers(0, 60))
    overlap = draw(st.integers(0, 40))
    assume(overlap + reserve < limit)
    overlap_turns = draw(st.none() | st.integers(0, 5))
    return tuple(turns), prefix, ContextPolicy(limit, overlap, reserve, overlap_turns)


@given(recordings())
def test_every_window_fits_and_begins_with_the_same_prefix(
    case: tuple[tuple[Turn, ...], int, ContextPolicy],
) -> None:
    turns, prefix, policy = case
    stream = token_stream(turns)
    windows = [cut_window(i, s, *stream) for i, s in enumerate(split(turns, prefix, policy))]
    for window in windows:
        assert len(window.tokens) <= policy.limit
        assert window.prefix_len == prefix
        np.testing.assert_array_equal(window.tokens[:prefix], stream[0][:prefix])


@given(recordings())
def test_every_output_token_is_trained_exactly_once(
    case: tuple[tuple[Turn, ...], int, ContextPolicy],
) -> None:
    turns, prefix, policy = case
    stream = token_stream(turns)
    trained = [
        token
        for i, span in enumerate(split(turns, prefix, policy))
        for window in [cut_window(i, span, *stream)]
        for token in window.tokens[window.trained_mask].tolist()
    ]
    assert trained == [token for turn in turns for token in turn.output_ids]


@given(recordings())
def test_consecutive_windows_overlap_as_much_as_asked_and_no_more(
    case: tuple[tuple[Turn, ...], int, ContextPolicy],
) -> None:
    turns, prefix, policy = case
    ends = np.cumsum([len(t.suffix_ids) + len(t.output_ids) for t in turns])
    starts = np.maximum(ends - [len(t.suffix_ids) + len(t.output_ids) for t in turns], prefix)
    spans = split(turns, prefix, policy)
    for before, after in itertools.pairwise(spans):
        assert after.fresh_from == before.end
        carried = [s for s in starts if after.keep_from <= s < before.end and s >= prefix]
        if policy.overlap_turns is None:
            assert before.end - after.keep_from <= policy.overlap
        else:
            assert len(carried) <= policy.overlap_turns
        # One more turn of history would have broken the overlap or the limit.
        earlier = [s for s in starts if s < after.keep_from]
        if earlier:
            turn = int(np.searchsorted(ends, after.fresh_from, side="right"))
            need = max(policy.reserve, len(turns[turn].output_ids))
            context = prefix + int(starts[turn]) + len(turns[turn].suffix_ids) - int(earlier[-1])
            full = (
                before.end - earlier[-1] > policy.overlap
                if policy.overlap_turns is None
                else len(carried) == policy.overlap_turns
            )
            assert full or context + need > policy.limit - 12


@given(recordings())
def test_the_splitter_shows_each_turn_the_context_the_agent_saw(
    case: tuple[tuple[Turn, ...], int, ContextPolicy],
) -> None:
    turns, prefix, policy = case
    stream = token_stream(turns)
    tracker = WindowTracker(policy, prefix)
    seen = []
    position = 0
    for turn in turns:
        suffix_end = position + len(turn.suffix_ids)
        end = suffix_end + len(turn.output_ids)
        if end > prefix:
            # Online the output's length is not known; the agent's outputs never pass the reserve.
            keep_from = tracker.open_turn(max(position, prefix), suffix_end)
            seen.append([*range(prefix), *range(keep_from, suffix_end)])
        tracker.close_turn(end)
        position = end
    shown = []
    position = 0
    spans = split(turns, prefix, policy)
    assert spans == tracker.spans()
    for turn in turns:
        suffix_end = position + len(turn.suffix_ids)
        position = suffix_end + len(turn.output_ids)
        if position <= prefix:
            continue
        span = next(s for s in spans if s.fresh_from <= suffix_end < s.end)
        window = cut_window(0, span, *stream)
        first = int(np.flatnonzero(window.tokens == turn.output_ids[0])[0])
        shown.append(window.tokens[:first].tolist())
    assert shown == seen


def test_a_prefix_that_leaves_no_room_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"task t: .*context_limit=100; raise it above 120"):
        ContextPolicy(100, 10, 20).check_prefix(100, "task t")


def test_a_turn_that_fits_nowhere_is_refused_by_number() -> None:
    turns = (Turn((1,) * 5, (2,) * 5), Turn((3,) * 80, (4,) * 5))
    with pytest.raises(UserError, match="turn 1"):
        split(turns, 5, ContextPolicy(64, 10, 10))


def test_a_refused_turn_leaves_the_tracker_as_it_was() -> None:
    tracker = WindowTracker(ContextPolicy(64, 10, 10), 5)
    tracker.open_turn(5, 10)
    tracker.close_turn(20)
    before = tracker.spans()
    with pytest.raises(ContextOverflow):
        tracker.open_turn(20, 100)
    assert tracker.spans() == before


@pytest.mark.parametrize(
    ("limit", "overlap", "reserve"), [(0, 0, 1), (10, -1, 1), (10, 5, 5), (10, 0, 0)]
)
def test_contradictory_numbers_are_refused(limit: int, overlap: int, reserve: int) -> None:
    with pytest.raises(UserError, match="splitting"):
        ContextPolicy(limit, overlap, reserve)


MARKERS = st.sampled_from([(), (-1,), (-1, -2)])
FADES = st.lists(st.integers(2, 12), min_size=1, max_size=4).map(
    lambda tokens: tuple(sorted(tokens, reverse=True))
)


@given(recordings(), FADES, MARKERS)
def test_carried_over_texts_fade_with_age_and_nothing_else_does(
    case: tuple[tuple[Turn, ...], int, ContextPolicy],
    fade: tuple[int, ...],
    marker: tuple[int, ...],
) -> None:
    turns, prefix, plain = case
    policy = replace(plain, fade=fade, marker=marker)
    stream = token_stream(turns)
    spans = split(turns, prefix, policy)
    windows = [cut_window(i, span, *stream) for i, span in enumerate(spans)]
    trained = [t for window in windows for t in window.tokens[window.trained_mask].tolist()]
    assert trained == [token for turn in turns for token in turn.output_ids]
    for span, window in zip(spans, windows, strict=True):
        assert len(window.tokens) == span.length <= policy.limit
        assert window.tokens[window.tokens < 0].tolist() == [*marker] * len(span.left_out)
        if policy.overlap_turns is None and span.fresh_from:
            carried = span.fresh_from - span.keep_from
            hidden = sum(end - begin - len(marker) for begin, end in span.left_out)
            assert carried - hidden <= policy.overlap, "marks count"
        shown, ages, end = set(window.tokens.tolist()), 0, len(stream[0])
        for turn in reversed(turns):
            begin, end = end - len(turn.suffix_ids) - len(turn.output_ids), end
            text = turn.suffix_ids[max(0, prefix - begin) :]
            if begin + len(turn.suffix_ids) <= span.end and max(begin, prefix) >= span.keep_from:
                seen = [token for token in text if token in shown]
                assert set(turn.output_ids) <= shown
                if begin >= span.fresh_from or not span.fresh_from:
                    assert seen == list(text)
                else:
                    most = fade[min(ages, len(fade) - 1)]
                    ages += 1
                    kept = most - len(marker) if most < len(text) else len(text)
                    head = kept // 2
                    assert seen == [*text[:head], *text[len(text) - (kept - head) :]]
            end = begin


def test_fading_makes_room_for_more_turns() -> None:
    turns = tuple(Turn(tuple(range(n * 20, n * 20 + 16)), (1000 + n,) * 4) for n in range(6))
    plain = split(turns, 2, ContextPolicy(90, 40, 4))
    faded = split(turns, 2, ContextPolicy(90, 40, 4, fade=(8, 4)))
    assert plain[1].fresh_from - plain[1].keep_from == 2 * 20
    # 8 and 4, twice 4, of the environment, and 4 of the assistant each.
    assert faded[1].fresh_from - faded[1].keep_from == 4 * 20 - 2
    assert faded[1].left_out[-1] == (64, 72)
    marked = split(turns, 2, ContextPolicy(90, 40, 4, fade=(8, 4), marker=(-1, -2)))
    assert marked[1].left_out[-1] == (63, 73)
    assert marked[1].length == faded[1].length
    window = cut_window(1, marked[1], *token_stream(turns)).tokens.tolist()
    assert window[window.index(62) :][:3] == [62, -1, -2] and 73 in window and 72 not in window
    with pytest.raises(UserError, match=r"fade=\[8, 4\] has no room for the 5 tokens"):
        ContextPolicy(90, 40, 4, fade=(8, 4), marker=(1, 2, 3, 4, 5))
    with pytest.raises(UserError, match="must not grow with age"):
        ContextPolicy(90, 40, 4, fade=(4, 8))
    with pytest.raises(UserError, match="nor be negative"):
        ContextPolicy(90, 40, 4, fade=(4, -1))


def test_history_is_carried_over_by_turns_where_asked() -> None:
    turns = tuple(Turn((n,) * 4, (100 + n,) * 4) for n in range(8))
    for count, kept in ((None, 8), (0, 0), (1, 8), (2, 16), (9, 24)):
        spans = split(turns, 2, ContextPolicy(40, 8, 4, count))
        assert spans[1].fresh_from - spans[1].keep_from == kept
    with pytest.raises(UserError, match="overlap_turns must be at least 0, not -1"):
        ContextPolicy(40, 8, 4, -1)


def test_the_prefix_cannot_grow_after_a_cut() -> None:
    tracker = WindowTracker(ContextPolicy(40, 0, 10), 5)
    tracker.open_turn(5, 10)
    tracker.close_turn(20)
    tracker.open_turn(20, 35)
    tracker.close_turn(40)
    assert not tracker.uncut
    with pytest.raises(ValueError, match="prefix"):
        tracker.pin(20)
