"""The order of the data follows from seed and position, and each window comes once an epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message
from klong_jax.core.trajectory import Window
from klong_jax.sft.data import Joined, WindowDataset, best_shared, windows_of
from klong_jax.sft.mixture import Mixture, Source
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.chat import Chat
from klong_jax.text.tokenizer import train_tokenizer


def dataset(count: int) -> WindowDataset:
    def window(index: int) -> Window:
        one = np.array([index])
        return Window(index, 0, one, one > -1, one.astype(np.float32), one, 1)

    return WindowDataset("test", tuple((window(index),) for index in range(count)), 1)


def test_an_epoch_holds_each_window_once_in_an_order_of_its_own() -> None:
    data = dataset(10)
    seen = [w.index for position in range(0, 30, 5) for (w,) in data.batch(position, 5, seed=3)]
    epochs = [seen[0:10], seen[10:20], seen[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_batch_at_a_position_is_always_the_same() -> None:
    first = [w.index for (w,) in dataset(10).batch(7, 6, seed=1)]
    assert first == [w.index for (w,) in dataset(10).batch(7, 6, seed=1)]
    assert first != [w.index for (w,) in dataset(10).batch(7, 6, seed=2)]


GROUPS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 5)), max_size=8)


def spared(groups: list[tuple[int, int]], lengths: tuple[int, ...]) -> int:
    """Tokens that are not computed again."""
    return sum(
        (windows - 1) * max((n for n in lengths if n <= prefix), default=0)
        for prefix, windows in groups
    )


@given(GROUPS)
def test_one_length_is_the_best_and_each_further_one_pays(groups: list[tuple[int, int]]) -> None:
    most = max((spared(groups, (length,)) for length in range(0, 61, 8)), default=0)
    alone = best_shared(groups, 8, 64, rows_share=2.0)
    assert len(alone) == (most > 0)
    assert spared(groups, alone) == most
    several = best_shared(groups, 8, 64, rows_share=0.0)
    assert set(alone) <= set(several) <= set(range(8, 64, 8))
    assert len(several) <= 3
    rest = [length for length in several if length not in alone]
    left = 64 * sum(windows for _, windows in groups) - most
    assert spared(groups, several) - most >= len(rest) * 0.03 * left * (1 - 0.03)


def test_a_length_is_added_where_it_spares_more_than_it_leaves_empty() -> None:
    groups = [(2048, 8)] * 10 + [(8192, 8)] * 10
    assert best_shared(groups, 128, 32768, 0.0) == (2048, 8192)
    assert best_shared(groups, 128, 32768, 0.5) == (8192,)
    assert best_shared([(2048, 8)] * 20 + [(8192, 2)], 128, 32768, 0.0) == (2048,)


def test_a_prefix_that_does_not_fit_names_the_recording() -> None:
    chat = Chat(train_tokenizer(["a b c"], 300))
    messages = (Message("user", "long " * 50), Message("assistant", "yes"))
    with pytest.raises(UserError, match=r"file\.jsonl:3: the pinned prefix"):
        windows_of(chat, messages, 1, ContextPolicy(60, 5, 5), "file.jsonl:3")


def test_no_windows_is_an_error() -> None:
    with pytest.raises(UserError, match="holds no windows"):
        WindowDataset("empty", (), 1)


def test_a_mixture_draws_from_all_of_its_sources() -> None:
    one, other = dataset(6).groups, dataset(3).groups
    mixture = Mixture([Source("a", 6, weight=1.0), Source("b", 3, epochs=2)], 18, seed=0)
    data = WindowDataset("mixed", Joined([one, other]), 1, mixture=mixture)
    drawn = [data.batch(position, 3, seed=0) for position in range(0, 18, 3)]
    flat = [group for batch in drawn for group in batch]
    for number, groups in ((2, one), (2, other)):
        assert all(sum(group is drawn_one for drawn_one in flat) == number for group in groups)
    assert data.batch(6, 3, seed=0) == drawn[2]
    with pytest.raises(IndexError):
        data.groups[9]
