"""Rows hold every window once, are never too full, and few of them are half empty."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.splitting.packing import pack

CAPACITY = 20
LENGTHS = st.lists(st.integers(0, CAPACITY), max_size=40)


@given(LENGTHS, st.integers(1, 8))
def test_every_window_is_in_one_row_that_holds_it(lengths: list[int], most: int) -> None:
    rows = pack(lengths, CAPACITY, most)
    assert sorted(number for row in rows for number in row) == [
        number for number, length in enumerate(lengths) if length
    ]
    assert all(sum(lengths[number] for number in row) <= CAPACITY for row in rows)
    assert all(len(row) <= most for row in rows)
    assert rows == pack(list(lengths), CAPACITY, most)


@given(LENGTHS)
def test_no_two_rows_would_fit_into_one(lengths: list[int]) -> None:
    rows = pack(lengths, CAPACITY, len(lengths) + 1)
    fullness = sorted(sum(lengths[number] for number in row) for row in rows)
    assert len(rows) == 1 or fullness[0] + fullness[1] > CAPACITY


def test_a_window_goes_where_it_leaves_least() -> None:
    assert pack([5, 13, 9, 6, 7], CAPACITY, 9) == [[1, 4], [2, 3, 0]]
    assert pack([1] * 5, CAPACITY, 2) == [[0, 1], [2, 3], [4]]
    assert pack([0, 0], CAPACITY, 2) == [[]]


def test_a_window_longer_than_a_row_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="a window of 21 tokens does not fit into a row of 20"):
        pack([3, 21], CAPACITY, 2)
