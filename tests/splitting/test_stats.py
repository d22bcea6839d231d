"""The numbers of a corpus are those of its windows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.trajectory import Turn
from klong_jax.splitting.packing import pack
from klong_jax.splitting.plan import plan_recorded
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.splitting.recorded import Mode, SplitOptions, split_recorded
from klong_jax.splitting.stats import Spread, TrainedByPosition, corpus_stats

POLICY = ContextPolicy(64, 16, 10, fade=(12, 4), marker=(9,))
LENGTHS = st.lists(st.tuples(st.integers(6, 40), st.integers(1, 8)), min_size=1, max_size=8)


@given(
    st.lists(LENGTHS, min_size=1, max_size=4),
    st.sampled_from(["klong", "sliding_no_pin", "truncate_tail"]),
    st.integers(1, 64),
)
def test_a_corpus_is_the_sum_of_its_windows(
    corpus: list[list[tuple[int, int]]], mode: Mode, bins: int
) -> None:
    turns = [tuple(Turn((1,) * s, (2,) * o) for s, o in lengths) for lengths in corpus]
    split = [split_recorded(t, 6, POLICY, SplitOptions(mode=mode), "f") for t in turns]
    stats = corpus_stats([plan_recorded("a", "f", made) for made in split], POLICY.limit)
    windows = [window for made in split for window in made.windows()]
    assert stats.trajectories == len(corpus)
    assert stats.windows.total == len(windows)
    assert stats.window_tokens.total == sum(len(window.tokens) for window in windows)
    assert stats.window_tokens.largest == max(len(window.tokens) for window in windows)
    computed = sum(POLICY.limit - len(window.tokens) for window in windows)
    assert stats.padding_share == pytest.approx(computed / (len(windows) * POLICY.limit))
    rows = pack([len(window.tokens) for window in windows], POLICY.limit, 128)
    left = len(rows) * POLICY.limit - stats.window_tokens.total
    assert stats.packed_padding_share == pytest.approx(left / (len(rows) * POLICY.limit))
    assert stats.packed_padding_share <= stats.padding_share
    assert stats.prefix_tokens == sum(window.prefix_len for window in windows)
    hidden = [b - a for made in split for span in made.spans for a, b in span.left_out]
    assert stats.faded_tokens == sum(hidden)
    assert stats.trained_tokens == sum(int(window.trained_mask.sum()) for window in windows)
    said = sum(output for lengths in corpus for _, output in lengths)
    assert stats.trained_tokens + stats.untrained_tokens == said
    assert (stats.untrained_tokens == 0) == (stats.dropped_turns == 0)

    trained = TrainedByPosition(POLICY.limit, bins)
    trained.add(windows)
    points = trained.points()
    assert len(points) <= bins
    assert [x for x, _ in points] == sorted({x for x, _ in points})
    width = -(-POLICY.limit // bins)
    for middle, share in points:
        low = int(middle - width / 2)
        masks = [mask for w in windows for mask in w.trained_mask[low : low + width].tolist()]
        assert share == sum(masks) / len(masks)


def test_quantiles_are_members() -> None:
    assert Spread.of([5]) == Spread(5, 5, 5, 5)
    assert Spread.of(range(1, 11)) == Spread(55, 5, 9, 10)
