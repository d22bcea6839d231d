"""Every backend of the grouped product against the formula in float64, in value and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import assert_close, temporaries, value_and_gradients

from klong_jax.kernels.grouped_matmul import api, grouped_matmul, tpu


def inputs(rows: int, inner: int, outer: int, groups: int) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    lhs, rhs = rng.normal(size=(rows, inner)), rng.normal(size=(groups, inner, outer))
    return [lhs, rhs], rng.normal(size=(rows, outer))


def check(backend: str, rows: int, shape: tuple[int, int], sizes: list[int]) -> None:
    arrays, cotangent = inputs(rows, *shape, len(sizes))

    def run(lhs: jax.Array, rhs: jax.Array, backend: str = backend) -> jax.Array:
        return grouped_matmul(lhs, rhs, jnp.asarray(sizes, jnp.int32), backend=backend)

    reference = partial(run, backend="reference")
    want = value_and_gradients(reference, arrays, cotangent, dtype="float64")
    assert_close(value_and_gradients(run, arrays, cotangent, dtype="float32"), want, 1e-5)
    assert not want[0][sum(sizes) :].any() and not want[1][sum(sizes) :].any()


def test_the_reference_is_the_formula() -> None:
    (lhs, rhs), _ = inputs(6, 3, 2, 3)
    got = grouped_matmul(*map(jnp.float32, (lhs, rhs)), jnp.asarray([2, 0, 3]), backend="reference")
    want = np.concatenate([lhs[:2] @ rhs[0], lhs[2:5] @ rhs[2], np.zeros((1, 2))])
    np.testing.assert_allclose(got, want, atol=1e-5)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 30))
@settings(max_examples=10)
def test_tiles_equal_the_reference(sizes: list[int], spare: int) -> None:
    check("cpu", max(1, sum(sizes) + spare), (5, 7), sizes)


SIZES = [[10, 0, 130, 1, 150], [300], [0, 0, 0], [299, 1], [128, 128, 0]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("backend", ["cpu", "xla", "megablox"])
def test_every_backend_equals_the_reference(
    backend: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    megablox = partial(tpu.grouped_matmul, interpret=True)
    monkeypatch.setattr(api, "BACKENDS", {**api.BACKENDS, "megablox": megablox})
    check(backend, 300, (130, 150), sizes)


def test_a_row_is_multiplied_with_one_matrix_only() -> None:
    """Else memory, and time, would grow with the number of groups."""

    def at(groups: int) -> int:
        shapes = (256, 32), (groups, 32, 32)
        lhs, rhs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
        return temporaries(partial(grouped_matmul, backend="cpu"), lhs, rhs, sizes)

    assert at(64) < 2 * at(4)
