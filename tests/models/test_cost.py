"""Counted parameters are those of the decoder, and passes add up however they are cut."""

from typing import get_args

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.models.config import Remat
from klong_jax.models.cost import (
    forward_flops,
    parameters,
    prefix_sharing_flops,
    repeated_flops,
)
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


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 500), st.integers(0, 500))
def test_full_repeats_a_pass_and_the_others_less(name: str, new: int, old: int) -> None:
    config = preset(name)
    full = repeated_flops(config, "full", 2, new, old)
    assert full == pytest.approx(forward_flops(config, 2, new, old, 0))
    repeated = [repeated_flops(config, remat, 2, new, old) for remat in get_args(Remat)]
    # In the order of their names, which is the order they are tried in.
    assert repeated == sorted(repeated) and repeated[0] == 0
    # Experts' products are no dots to the policy.
    assert (repeated[1] > 0) == (config.moe is not None)
