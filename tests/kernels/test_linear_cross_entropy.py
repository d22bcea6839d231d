"""Tiled cross-entropy against the formula in float64: values, gradients, memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import assert_close, on_eight_devices, temporaries, value_and_gradients

from klong_jax.kernels.linear_cross_entropy import linear_cross_entropy, token_logprobs


def everything(
    hidden: Any, embedding: Any, weights: Any, *, targets: np.ndarray, **options: Any
) -> jax.Array:
    """All that the kernel gives, in one vector."""
    out = linear_cross_entropy(hidden, embedding, jnp.asarray(targets), weights, **options)
    parts = jnp.atleast_1d(out.weighted_sum), out.logprobs.ravel(), out.entropies.ravel()
    return jnp.concatenate(parts)


def inputs(
    shape: tuple[int, ...], width: int, vocab: int
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden, weights = rng.normal(size=(*shape, width)), rng.normal(size=shape)
    targets = rng.integers(0, vocab, shape)
    cotangent = rng.normal(size=1 + 2 * targets.size)
    return [hidden, rng.normal(size=(vocab, width)), weights], targets, cotangent


def test_the_reference_is_the_formula() -> None:
    (hidden, embedding, _), targets, _ = inputs((3,), 4, 5)
    p = np.exp(hidden @ embedding.T)
    p /= p.sum(axis=1, keepdims=True)
    got = token_logprobs(*map(jnp.float32, (hidden, embedding)), targets, backend="reference")
    np.testing.assert_allclose(got[0], np.log(p[np.arange(3), targets]), atol=1e-5)
    np.testing.assert_allclose(got[1], -(p * np.log(p)).sum(axis=1), atol=1e-5)


@given(
    st.lists(st.integers(1, 9), min_size=0, max_size=3),
    st.integers(1, 40),
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
)
@settings(max_examples=8)
def test_tiles_equal_the_reference(shape: list[int], vocab: int, tile: tuple[int, int]) -> None:
    arrays, targets, cotangent = inputs(tuple(shape), 6, vocab)
    reference = partial(everything, targets=targets, backend="reference")
    want = value_and_gradients(reference, arrays, cotangent, dtype="float64")
    run = partial(everything, targets=targets, tile=tile)
    assert_close(value_and_gradients(run, arrays, cotangent, dtype="float64"), want, 1e-12)


@pytest.mark.parametrize("tile", [(4, 8), (7, 31), (64, 16), None])
def test_float32_is_close_to_the_truth(tile: tuple[int, int] | None) -> None:
    arrays, targets, cotangent = inputs((2, 13), 8, 31)
    reference = partial(everything, targets=targets, backend="reference")
    want = value_and_gradients(reference, arrays, cotangent, dtype="float64")
    run = partial(everything, targets=targets, tile=tile)
    assert_close(value_and_gradients(run, arrays, cotangent, dtype="float32"), want, 1e-5)


def test_no_table_of_all_logits_exists() -> None:
    tokens, width, vocab, tile = 4096, 16, 1024, (512, 512)

    def step(hidden: Any, embedding: Any, targets: Any, weights: Any, tile: Any = tile) -> Any:
        def loss(*states: Any) -> Any:
            return linear_cross_entropy(*states, targets, weights, tile=tile).weighted_sum

        return jax.grad(loss, argnums=(0, 1))(hidden, embedding)

    shapes = (1, tokens, width), (vocab, width), (1, tokens), (1, tokens)
    kinds = jnp.float32, jnp.float32, jnp.int32, jnp.float32
    given = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, kinds, strict=True)]
    table = tokens * vocab * 4
    assert temporaries(step, *given) < table / 3
    assert temporaries(partial(step, tile=(tokens, vocab)), *given) > table


@pytest.mark.slow
def test_a_mesh_does_not_change_the_result_nor_hold_the_table(
    measured: Callable[[str], None],
) -> None:
    measured(on_eight_devices("sharded_linear_cross_entropy.py"))
