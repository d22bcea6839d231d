"""The kernels as a GPU runs them, in 16 bits, against the formulas in float64 of the same numbers.

Operands, weights and gradients of scores are rounded to 8 bits before they are multiplied: one part
in 256 or less for each, and less than one in a hundred together, as errors average out.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_helpers import Arrays, value_and_gradients

from klong_jax.kernels.attention import attention
from klong_jax.kernels.grouped_matmul import grouped_matmul
from klong_jax.kernels.linear_cross_entropy import linear_cross_entropy
from klong_jax.kernels.rotary_norm import rotary_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]

TOLERANCE = 1e-2


def normal(*shape: int, seed: int) -> np.ndarray:
    """Numbers that 16 bits hold exactly."""
    draws = np.random.default_rng(seed).normal(size=shape)
    return np.asarray(jnp.asarray(draws, jnp.bfloat16), np.float64)


def check(run: Any, arrays: Arrays, cotangent: np.ndarray, **reference: Any) -> list[np.ndarray]:
    """Compares with the reference backend; gives value and gradients in 16 bits."""
    got = value_and_gradients(run, arrays, cotangent, dtype="bfloat16")
    formula = partial(run, backend="reference")
    want = value_and_gradients(formula, arrays, cotangent, dtype="float64")
    for one, other in zip(got, want, strict=True):
        wide = one.astype(np.float64)
        assert np.isfinite(wide).all()
        assert np.linalg.norm(wide - other) <= TOLERANCE * np.linalg.norm(other)
    return got


RAGGED = {"lengths": np.asarray([130, 0, 77]), "prefix_lengths": np.asarray([0, 100, 170])}


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("window", "keys", "options"),
    [
        (256, 256, {}),
        (200, 200, {"lengths": np.asarray([200, 0, 3])}),
        (130, 300, {}),
        (600, 1500, {"scale": 0.3}),
        (130, 300, RAGGED),
        (130, 300, RAGGED | {"causal": False}),
        (130, 300, {"causal": False}),
    ],
)
def test_attention(window: int, keys: int, options: dict[str, Any], width: int) -> None:
    query, cotangent = (normal(3, window, 4, width, seed=seed) for seed in (0, 1))
    key, value = (normal(3, keys, 2, width, seed=seed) for seed in (2, 3))
    got = check(partial(attention, **options), [query, key, value], cotangent)
    out, d_query, *d_keys = got
    prefix = keys - window
    for row, real in enumerate(options.get("lengths", [window] * 3)):
        assert not out[row, real:].any() and not d_query[row, real:].any()
        ends = options.get("prefix_lengths", [prefix] * 3)
        for each in d_keys:
            assert not each[row, prefix + real :].any()
            assert not each[row, ends[row] : prefix].any()


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        (256, [[256]]),
        (300, [[100, 1, 130], [], [7, 293], [1] * 128]),
        (1500, [[700, 3, 500], [300] * 5, [1499]]),
    ],
)
def test_attention_of_windows_that_share_a_row(
    tokens: int, rows: list[list[int]], causal: bool, width: int
) -> None:
    numbers = [np.repeat(1 + np.arange(len(lengths)), lengths) for lengths in rows]
    segments = np.stack([np.pad(each, (0, tokens - len(each))) for each in numbers])
    query, cotangent = (normal(len(rows), tokens, 4, width, seed=seed) for seed in (0, 1))
    key, value = (normal(len(rows), tokens, 2, width, seed=seed) for seed in (2, 3))

    def run(*arrays: jax.Array, backend: str | None = None) -> jax.Array:
        # cuDNN where a backend is not asked for, and nothing portable in its place.
        options: dict[str, Any] = {"segments": jnp.asarray(segments), "causal": causal}
        return attention(*arrays, backend=backend or "gpu", **options)

    for one in check(run, [query, key, value], cotangent):
        assert not one[segments == 0].any()


@pytest.mark.parametrize(("inner", "outer"), [(128, 256), (192, 320), (130, 150)])
@pytest.mark.parametrize(
    "sizes", [[10, 0, 130, 1, 150], [300], [0, 0, 0], [299, 1], [128, 128, 0], [5] * 60]
)
def test_grouped_matmul(sizes: list[int], inner: int, outer: int) -> None:
    lhs, rhs = normal(304, inner, seed=0), normal(len(sizes), inner, outer, seed=1)

    def run(lhs: jax.Array, rhs: jax.Array, backend: str | None = None) -> jax.Array:
        return grouped_matmul(lhs, rhs, jnp.asarray(sizes, jnp.int32), backend=backend)

    out, d_lhs, d_rhs = check(run, [lhs, rhs], normal(304, outer, seed=2))
    assert not out[sum(sizes) :].any() and not d_lhs[sum(sizes) :].any()
    assert not d_rhs[np.asarray(sizes) == 0].any()


@pytest.mark.parametrize("vocab", [1920, 3000])
@pytest.mark.parametrize("tile", [(128, 512), None])
def test_linear_cross_entropy(tile: tuple[int, int] | None, vocab: int) -> None:
    tokens, width = 300, 128
    hidden, embedding = normal(tokens, width, seed=0), normal(vocab, width, seed=1) / 8
    targets = np.random.default_rng(2).integers(0, vocab, tokens)

    def run(hidden: Any, embedding: Any, weights: Any, backend: str | None = None) -> jax.Array:
        out = linear_cross_entropy(
            hidden, embedding, jnp.asarray(targets), weights, tile=tile, backend=backend
        )
        return jnp.concatenate([out.weighted_sum[None], out.logprobs, out.entropies])

    arrays = [hidden, embedding, normal(tokens, seed=3)]
    check(run, arrays, normal(1 + 2 * tokens, seed=4))


@pytest.mark.parametrize(("heads", "width"), [(16, 128), (5, 64)])
def test_rotary_norm(heads: int, width: int) -> None:
    arrays = [normal(2, 333, heads, width, seed=0), normal(width, seed=1)]
    angles = np.random.default_rng(2).uniform(0, 1e5, (2, 333, width // 2))

    def run(x: Any, scale: Any, backend: str | None = None) -> Any:
        turns = jnp.cos(jnp.asarray(angles)), jnp.sin(jnp.asarray(angles))
        return rotary_norm(x, scale, *turns, epsilon=1e-6, backend=backend)

    check(run, arrays, normal(2, 333, heads, width, seed=3))
