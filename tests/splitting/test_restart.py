"""Turns whose context does not extend what was there: each begins a window of its own tokens."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_policy import recordings

from klong_jax.core.trajectory import Turn, cut_window, token_stream
from klong_jax.splitting.policy import ContextPolicy, split

Case = tuple[tuple[Turn, ...], int, ContextPolicy]


@given(recordings(), st.sets(st.integers(0, 30)))
def test_a_restart_keeps_the_prefix_and_nothing_else(case: Case, chosen: set[int]) -> None:
    turns, prefix, policy = case
    ends = np.cumsum([len(turn.suffix_ids) + len(turn.output_ids) for turn in turns]).tolist()
    starts = [0, *ends[:-1]]
    restarts = [n for n in range(len(turns)) if n in chosen and starts[n] >= prefix]
    marked = tuple(
        replace(turn, restart="why" if number in restarts else "")
        for number, turn in enumerate(turns)
    )
    spans = split(marked, prefix, policy)
    for number in restarts:
        window = next(span for span in spans if span.fresh_from <= starts[number] < span.end)
        assert window.keep_from == starts[number]
        # No later window reaches back behind it.
        later = spans[spans.index(window) :]
        assert all(span.keep_from >= starts[number] for span in later)
    assert all(span.length <= policy.limit for span in spans)
    stream = token_stream(marked)
    windows = [cut_window(index, span, *stream) for index, span in enumerate(spans)]
    trained = [token for w in windows for token in w.tokens[w.trained_mask].tolist()]
    assert trained == [token for turn in turns for token in turn.output_ids]
