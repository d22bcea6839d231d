"""The plan says what the windows do, and oversized observations are cut with a mark."""

from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.trajectory import Turn, cut_window, token_stream
from klong_jax.splitting.fit import fit_turns, truncate_middle
from klong_jax.splitting.plan import plan_windows
from klong_jax.splitting.policy import ContextPolicy, split

MARK = (-1, -2)
LENGTHS = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 10)), min_size=1, max_size=12)


@given(LENGTHS)
def test_any_recording_fits_once_its_suffixes_are_cut(lengths: list[tuple[int, int]]) -> None:
    policy = ContextPolicy(limit=64, overlap=16, reserve=10, marker=MARK)
    turns = tuple(Turn(tuple(range(s)), tuple(range(1000, 1000 + o))) for s, o in lengths)
    fitted = fit_turns(turns, 0, policy)
    assert [turn.output_ids for turn in fitted.turns] == [turn.output_ids for turn in turns]
    for number, (turn, original) in enumerate(zip(fitted.turns, turns, strict=True)):
        assert (turn.suffix_ids != original.suffix_ids) == (number in fitted.cut_turns)
    kept = sum(len(t.suffix_ids) - (2 if i in fitted.cut_turns else 0)
               for i, t in enumerate(fitted.turns))  # fmt: skip
    assert kept + fitted.cut_tokens == sum(len(turn.suffix_ids) for turn in turns)
    assert all(span.length <= policy.limit for span in split(fitted.turns, 0, policy))


@given(LENGTHS, st.sampled_from([(), (30,), (40, 12)]))
def test_the_plan_counts_what_the_windows_hold(
    lengths: list[tuple[int, int]], fade: tuple[int, ...]
) -> None:
    policy = ContextPolicy(limit=300, overlap=60, reserve=10, fade=fade, marker=MARK)
    turns = tuple(Turn(tuple(range(s)), tuple(range(1000, 1000 + o))) for s, o in lengths)
    spans = split(turns, 0, policy)
    stream = token_stream(turns)
    plans = plan_windows(turns, spans)
    assert [plan.first_trained_turn for plan in plans[1:]] == [
        plan.last_trained_turn + 1 for plan in plans[:-1]
    ]
    for index, (plan, span) in enumerate(zip(plans, spans, strict=True)):
        window = cut_window(index, span, *stream)
        assert plan.length == len(window.tokens)
        assert plan.trained_tokens == int(window.trained_mask.sum())
        assert plan.overlap_tokens <= policy.overlap
        own = turns[plan.first_trained_turn : plan.last_trained_turn + 1]
        fresh = sum(len(turn.suffix_ids) + len(turn.output_ids) for turn in own)
        assert plan.length == plan.overlap_tokens + fresh
        marks = int((window.tokens < 0).sum())
        assert marks == len(MARK) * len(span.left_out)
        assert plan.faded_tokens == plan.end - plan.start - plan.length + marks


def test_the_middle_goes_and_the_ends_stay() -> None:
    assert truncate_middle(range(100), 12, MARK) == (*range(5), -1, -2, *range(95, 100))
    assert truncate_middle((1, 2, 3), 3, MARK) == (1, 2, 3)
