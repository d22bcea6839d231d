"""Mixtures: shares at every prefix, whole epochs, and a position that is all there is to know."""

from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.sft.mixture import Mixture, Source, schedule

weights = st.floats(0.001, 100, allow_nan=False)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[Source], int | None, int]:
    """Sources with weights, with epochs, or both, as arguments of a mixture."""
    kinds = draw(st.lists(st.booleans(), min_size=1, max_size=4))
    sources = [
        Source(
            f"s{number}",
            draw(st.integers(1, 20)),
            weight=draw(weights) if weighted else None,
            epochs=None if weighted else draw(st.floats(0.1, 4)),
        )
        for number, weighted in enumerate(kinds)
    ]
    least = sum(max(1, round(s.size * s.epochs)) for s in sources if s.epochs is not None)
    units = least + draw(st.integers(1, 200)) if any(kinds) else None
    return sources, units, draw(st.integers(0, 2**32))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6))
def test_no_source_is_ever_a_whole_draw_off_its_share(shares: list[int]) -> None:
    total, counts = sum(shares), [0] * len(shares)
    bound = 1 - Fraction(1, max(2, 2 * len(shares) - 2))
    for position, (source, before) in enumerate(islice(schedule(shares, counts), 400), start=1):
        assert before == counts[source] - 1
        for share, count in zip(shares, counts, strict=True):
            assert abs(count - Fraction(share * position, total)) <= bound
    assert sum(counts) == 400


@given(mixtures())
def test_shares_are_kept_and_epochs_are_complete(
    case: tuple[list[Source], int | None, int],
) -> None:
    sources, units, seed = case
    mixture = Mixture(sources, units, seed)
    draws = [mixture.at(position) for position in range(len(mixture))]
    counts = Counter(draw.source for draw in draws)
    rest = len(mixture)
    for number, source in enumerate(sources):
        if source.epochs is not None:
            assert counts[number] == max(1, round(source.size * source.epochs))
            rest -= counts[number]
    total = sum(Fraction(source.weight) for source in sources if source.weight is not None)
    for number, source in enumerate(sources):
        if source.weight is not None:
            # Weights are taken as they are written, which the float only comes close to.
            assert abs(counts[number] - rest * Fraction(source.weight) / total) < 1 + 1e-9
        mine = [draw for draw in draws if draw.source == number]
        for epoch in range(len(mine) // source.size + 1):
            part = mine[epoch * source.size : (epoch + 1) * source.size]
            assert all(draw.epoch == epoch for draw in part)
            assert len({draw.index for draw in part}) == len(part)
            assert all(0 <= draw.index < source.size for draw in part)


@given(mixtures(), st.integers(0, 10**5), st.integers(1, 4))
def test_a_position_alone_says_what_is_drawn(
    case: tuple[list[Source], int | None, int], position: int, hosts: int
) -> None:
    one = Mixture(*case)
    ahead = [one.at(place) for place in range(position % 300 + 8)]
    # As hosts that resume there would read it, each a part and in any order.
    read = {}
    for host in reversed(range(hosts)):
        mixture = Mixture(*case)
        for place in reversed(range(position % 300 + host, position % 300 + 8, hosts)):
            read[place] = mixture.at(place)
    assert [read[place] for place in sorted(read)] == ahead[position % 300 :]
    assert Mixture(*case).at(position) == one.at(position)


def test_orders_differ_by_epoch_seed_and_name() -> None:
    def order(name: str, seed: int, epoch: int) -> tuple[int, ...]:
        mixture = Mixture([Source(name, 50, epochs=3)], None, seed)
        return tuple(mixture.at(epoch * 50 + place).index for place in range(50))

    orders = {order(n, s, e) for n in ("a", "b") for s in (0, 1) for e in (0, 1, 2)}
    assert len(orders) == 12
    assert all(sorted(each) == list(range(50)) for each in orders)


def test_far_positions_are_reached_and_the_period_repeats_shares_alone() -> None:
    mixture = Mixture([Source("a", 7, weight=0.7), Source("b", 5, weight=0.3)], 10**12, 0)
    draws = [mixture.at(10**12 - 10 + place) for place in range(10)]
    assert Counter(draw.source for draw in draws) == {0: 7, 1: 3}
    assert draws[-1].epoch in (7 * 10**11 // 7 - 1, 3 * 10**11 // 5 - 1)


@pytest.mark.parametrize(
    ("sources", "units", "problem"),
    [
        ([("a", 5, 1.0, None), ("a", 5, 1.0, None)], 9, "two sources are called a"),
        ([("a", 0, 1.0, None)], 9, "a holds nothing to train on"),
        ([("a", 5, None, None)], 9, "give a either a weight or epochs"),
        ([("a", 5, 1.0, 1.0)], 9, "give a either a weight or epochs"),
        ([("a", 5, 0.0, None)], 9, "the weight or epochs of a must be positive"),
        ([("a", 5, None, -1.0)], 9, "the weight or epochs of a must be positive"),
        ([("a", 5, 1.0, None), ("b", 5, None, 2.0)], None, "weights share out"),
        ([("a", 5, None, 2.0)], 10, "make 10 draws by themselves"),
        ([("a", 5, 1.0, None), ("b", 5, None, 2.0)], 10, "epochs take 10 of 10 draws"),
    ],
)
def test_contradictions_are_refused(
    sources: list[tuple[str, int, float | None, float | None]], units: int | None, problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        Mixture([Source(*source) for source in sources], units, 0)
