"""Rates of a step against counting by hand."""

import numpy as np
import pytest

from klong_jax.core.trajectory import Window
from klong_jax.models.config import DecoderConfig, MoeConfig
from klong_jax.training.batches import Layout, lay_out
from klong_jax.training.throughput import Meter, fresh_tokens, padding_share, step_flops

WHOLE = Layout(16, 1)
MODEL = DecoderConfig(30, 16, 3, 2, 1, 8, 32)


def window(index: int, mask: list[int], prefix_len: int = 0) -> Window:
    numbers = np.zeros(len(mask), np.int32)
    floats = numbers.astype(np.float32)
    return Window(index, prefix_len, numbers, np.asarray(mask, bool), floats, numbers, len(mask))


def test_operations_are_those_of_the_matrices_and_of_pairs_that_see_each_other() -> None:
    length, layers = 7, 3
    matrices = layers * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32) + 30 * 16
    pairs = sum(range(1, length + 1))
    by_hand = 2 * length * matrices + layers * 2 * (2 * 2 * 8 * pairs)
    pair = [(window(0, [1] * length),), (window(1, [1] * length),)]
    assert step_flops(MODEL, pair, WHOLE) == 3 * 2 * by_hand
    more = DecoderConfig(30, 16, 3, 2, 1, 8, 32, moe=MoeConfig(8, 2, 16))
    dense = step_flops(MODEL, pair, WHOLE)
    assert step_flops(more, pair, WHOLE) < dense * 1.2, "only active experts"


def test_a_prefix_that_is_computed_once_counts_once() -> None:
    group = tuple(window(index, [0] * 6 + [1] * 3, prefix_len=6) for index in range(4))
    whole = step_flops(MODEL, [group], WHOLE)
    assert whole == 4 * step_flops(MODEL, [group[:1]], WHOLE)
    once = step_flops(MODEL, [group], Layout(16, 1, shared=(6,), trained=True))
    spared = step_flops(MODEL, [(window(0, [0] * 6),)], WHOLE)
    assert once == whole - 3 * spared
    unread = step_flops(MODEL, [group], Layout(16, 1, shared=(6,), trained=False))
    assert unread == once - 3 * 2 * 6 * 30 * 16, "nothing predicts an untrained prefix"
    assert step_flops(MODEL, [group], Layout(16, 1, shared=(7,))) == whole, "it is too short"


def test_a_matrix_that_is_frozen_has_no_gradient_to_count() -> None:
    matrices = 3 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32) + 30 * 16
    group = tuple(window(index, [0] * 6 + [1] * 3, prefix_len=6) for index in range(4))
    for layout, tokens in ((WHOLE, 4 * 9), (Layout(16, 1, shared=(6,)), 6 + 4 * 3)):
        everything = step_flops(MODEL, [group], layout)
        nothing = step_flops(MODEL, [group], layout, learnt=0.0)
        assert everything - nothing == 2 * tokens * matrices
        assert step_flops(MODEL, [group], layout, learnt=0.5) == (everything + nothing) / 2


def test_what_a_window_repeats_is_no_progress() -> None:
    assert fresh_tokens(window(0, [0, 0, 1, 0, 1])) == 5
    assert fresh_tokens(window(2, [0, 0, 1, 0, 1])) == 3
    assert fresh_tokens(window(2, [1, 0])) == 2
    assert fresh_tokens(window(1, [0, 0])) == 0


def test_rates_are_shares_of_the_time_and_of_all_devices_peak() -> None:
    groups = [(window(0, [0, 0, 1, 0, 1]), window(1, [0, 0, 1, 0, 1]))]
    rates = Meter(MODEL, 4, 1e6).rates(groups, WHOLE, seconds=0.5, waited=0.125)
    assert rates == {
        "trained_tokens_per_s": 8,
        "trajectory_tokens_per_s": 16,
        "waiting_share": 0.25,
        "mfu": pytest.approx(step_flops(MODEL, groups, WHOLE) / 0.5 / 4e6),
    }


def test_the_padding_share_is_of_the_positions_computed() -> None:
    def share(layout: Layout, *groups: tuple[Window, ...]) -> float:
        return padding_share(list(lay_out(groups, [1.0] * len(groups), layout)))

    # Eight real tokens, six and four; two that are not trained stand at the end of the first.
    short = [(window(0, [1] * n + [0] * rest),) for n, rest in ((8, 2), (6, 0), (4, 0))]
    assert share(Layout(16, 1), *short) == 1 - 18 / 48
    assert share(Layout(16, 2), *short) == 1 - 18 / 64, "a row of padding fills the second call"
    assert share(Layout(16, 1, pack=True), *short) == 1 - 18 / 32
    assert share(Layout(16, 1, pack=True), *short[:2]) == 1 - 14 / 16
    pair = tuple(window(index, [0] * 6 + [1] * n, prefix_len=6) for index, n in enumerate((3, 8)))
    # A prefix of six, once; behind it three of ten tokens and eight of ten.
    shared = Layout(16, 1, shared=(6,), pack=True)
    assert share(shared, pair) == pytest.approx(1 - (6 + 3 + 8) / 26)
    assert share(shared, pair, *short) == pytest.approx(1 - (17 + 18) / (26 + 32))


def test_no_peak_is_made_up() -> None:
    groups = [(window(0, [1]),)]
    for kind, peak in (("TPU v5p", 459e12), ("NVIDIA H200", 989e12), ("TPU v6 lite", 918e12)):
        meter = Meter.of_devices(MODEL, 8, kind)
        assert meter == Meter(MODEL, 8, peak)
        assert "mfu" in meter.rates(groups, WHOLE, 1.0, 0.0)
    assert "mfu" not in Meter.of_devices(MODEL, 8, "cpu").rates(groups, WHOLE, 1.0, 0.0)
