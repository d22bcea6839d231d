"""Counted parameters are those of the decoder, and passes add up however they are cut."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.models.cost import forward_flops, parameters
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
