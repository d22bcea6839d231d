"""The kernels for Hopper GPUs become GPU programs here, where they cannot run: layouts, memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from klong_jax.core.errors import UserError
from klong_jax.kernels.attention import attention
from klong_jax.kernels.grouped_matmul import grouped_matmul
from klong_jax.kernels.linear_cross_entropy import linear_cross_entropy

HALF = jnp.bfloat16


def kernels(function: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> int:
    """How many there are in the program of a function."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return int(lowered.as_text().count("@mosaic_gpu"))


def test_attention_of_windows_that_share_a_row_lowers() -> None:
    def step(query: Any, key: Any, value: Any, segments: Any) -> Any:
        run = partial(attention, segments=segments, backend="gpu")
        out, pull = jax.vjp(run, query, key, value)
        return out, *pull(out)

    key = shape(2, 300, 2, 64)
    arguments = shape(2, 300, 4, 64), key, key, shape(2, 300, dtype=jnp.int32)
    lowered = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    # Forward, backward; as many sequences a row as there may be.
    assert [text.count(f"@__cudnn$fmhaSoftmax{name}(") for name in ("", "Backward")] == [1, 1]
    assert text.count("\\22max_seg_per_batch\\22: 128") == 2


def shape(*sizes: int, dtype: Any = HALF) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_grouped_matmul_lowers() -> None:
    def step(lhs: Any, rhs: Any, sizes: Any) -> Any:
        def product(lhs: Any, rhs: Any) -> Any:
            return grouped_matmul(lhs, rhs, sizes, backend="hopper")

        out, pull = jax.vjp(product, lhs, rhs)
        return out, *pull(out)

    # Widths that are no whole tiles; forward, and the gradients of rows and of matrices.
    sizes = shape(8, dtype=jnp.int32)
    assert kernels(step, shape(1000, 192), shape(8, 192, 1408), sizes) == 3


def test_linear_cross_entropy_lowers() -> None:
    def step(hidden: Any, embedding: Any, targets: Any) -> Any:
        def loss(hidden: Any, embedding: Any) -> Any:
            weights = jnp.ones(targets.shape)
            out = linear_cross_entropy(hidden, embedding, targets, weights, backend="hopper")
            return out.weighted_sum

        return jax.grad(loss, argnums=(0, 1))(hidden, embedding)

    # Statistics of all logits, and the gradient of a tile's.
    arguments = shape(300, 128), shape(1920, 128), shape(300, dtype=jnp.int32)
    assert kernels(step, *arguments) == 2


def test_what_they_do_not_take_is_said_in_a_sentence() -> None:
    sizes = jnp.asarray([8], jnp.int32)
    with pytest.raises(UserError, match=r"takes 16 bits, .* not float32\[8, 64\] and"):
        grouped_matmul(jnp.ones((8, 64)), jnp.ones((1, 64, 64)), sizes, backend="hopper")
    hidden, embedding = jnp.ones((4, 64), HALF), jnp.ones((100, 64), HALF)
    targets = jnp.zeros(4, jnp.int32)
    with pytest.raises(UserError, match=r"a vocabulary that 128 .* bfloat16\[100, 64\]"):
        linear_cross_entropy(hidden, embedding, targets, jnp.ones(4), backend="hopper")
