"""Counted parameters are those of the decoder, and passes add up however they are cut."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.models.cost import forward_flops, parameters, prefix_sharing_flops
from klong_jax.models.decoder import abstract
from klong_jax.models.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_matrices(name: str) -> None:
    config = preset(name)
    _, params = abstract(config)
    matrices = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if "kernel" in jax.tree_util.keystr(path) or "embedding" in jax.tree_util.keystr(path):
            matrices += leaf.size
    assert parameters(config) == matrices


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 500), st.integers(1, 500))
def test_a_pass_costs_what_its_parts_cost(name: str, first: int, second: int) -> None:
    config = preset(name)
    whole = forward_flops(config, 3, first + second, 0, first + second)
    parts = forward_flops(config, 3, first, 0, first)
    parts += forward_flops(config, 3, second, first, second)
    assert whole == pytest.approx(parts)


@given(
    st.sampled_from(sorted(PRESETS)),
    st.integers(1, 500),
    st.lists(st.integers(1, 500), min_size=1, max_size=6),
)
def test_sharing_a_prefix_saves_all_of_its_passes_but_one(
    name: str, prefix: int, fresh: list[int]
) -> None:
    config = preset(name)
    naive, shared = prefix_sharing_flops(config, prefix, fresh)
    once = 3 * forward_flops(config, 1, prefix, 0, prefix)
    assert naive - shared == pytest.approx((len(fresh) - 1) * once, abs=1e-6 * naive)
    assert shared == pytest.approx(naive) if len(fresh) == 1 else shared < naive
