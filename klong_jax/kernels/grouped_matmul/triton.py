"""Grouped matrix multiplication on GPUs of any generation, in Pallas through Triton.

On Hopper GPUs it takes what the kernels made for them do not: widths that are no whole steps.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from klong_jax.kernels.grouped_matmul.cpu import tiles
from klong_jax.kernels.grouped_matmul.gradient import differentiable

_ROWS, _COLUMNS, _STEP = 128, 128, 32
_PARAMETERS = plt.CompilerParams(num_warps=4, num_stages=4)
_load = partial(plt.load, other=0)


class _Span(NamedTuple):
    """Part of a dimension, and which of it is real."""

    at: Any
    real: Any

    @classmethod
    def of(cls, start: Any, size: int, end: Any) -> "_Span":
        return cls(pl.ds(start, size), start + jnp.arange(size) < end)


def _product(
    lhs: Float[Array, "m a"],
    rhs: Float[Array, "e k n"],
    group_sizes: Int[Array, "e"],
    *,
    transposed: bool,
) -> Float[Array, "m b"]:
    rows, inner = lhs.shape
    outer = rhs.shape[1] if transposed else rhs.shape[2]
    where = tiles(group_sizes.astype(jnp.int32), rows, _ROWS)
    across = pl.cdiv(outer, _COLUMNS)

    def body(group: Any, start: Any, count: Any, lhs: Any, rhs: Any, out: Any) -> None:
        tile, column = pl.program_id(0) // across, pl.program_id(0) % across * _COLUMNS

        @pl.when(count[tile] > 0)
        def _() -> None:
            own = _Span.of(start[tile], _ROWS, start[tile] + count[tile])
            strip = _Span.of(column, _COLUMNS, outer)
            matrix = group[tile]

            def step(index: Any, total: Any) -> Any:
                deep = _Span.of(index * _STEP, _STEP, inner)
                left = _load(lhs.at[own.at, deep.at], mask=own.real[:, None] & deep.real)
                if transposed:
                    mask = strip.real[:, None] & deep.real
                    right = _load(rhs.at[matrix, strip.at, deep.at], mask=mask).T
                else:
                    mask = deep.real[:, None] & strip.real
                    right = _load(rhs.at[matrix, deep.at, strip.at], mask=mask)
                return total + plt.dot(left, right)

            total = jnp.zeros((_ROWS, _COLUMNS), jnp.float32)
            total = jax.lax.fori_loop(0, pl.cdiv(inner, _STEP), step, total)
            mask = own.real[:, None] & strip.real
            plt.store(out.at[own.at, strip.at], total.astype(out.dtype), mask=mask)

    shape = jax.ShapeDtypeStruct((rows, outer), lhs.dtype)
    return _run(body, shape, where.group.size * across)(*where, lhs, rhs)


def _outer(
    lhs: Float[Array, "m k"], d_out: Float[Array, "m n"], group_sizes: Int[Array, "e"]
) -> Float[Array, "e k n"]:
    inner, outer, groups = lhs.shape[1], d_out.shape[1], group_sizes.shape[0]
    down, across = pl.cdiv(inner, _ROWS), pl.cdiv(outer, _COLUMNS)
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))

    def body(starts: Any, ends: Any, lhs: Any, d_out: Any, out: Any) -> None:
        group, place = pl.program_id(0) // (down * across), pl.program_id(0) % (down * across)
        start, end = starts[group], ends[group]
        high = _Span.of(place // across * _ROWS, _ROWS, inner)
        wide = _Span.of(place % across * _COLUMNS, _COLUMNS, outer)

        def step(index: Any, total: Any) -> Any:
            own = _Span.of(start + index * _STEP, _STEP, end)
            left = _load(lhs.at[own.at, high.at], mask=own.real[:, None] & high.real)
            right = _load(d_out.at[own.at, wide.at], mask=own.real[:, None] & wide.real)
            return total + plt.dot(left.T, right)

        total = jnp.zeros((_ROWS, _COLUMNS), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(end - start, _STEP), step, total)
        mask = high.real[:, None] & wide.real
        plt.store(out.at[group, high.at, wide.at], total.astype(out.dtype), mask=mask)

    shape = jax.ShapeDtypeStruct((groups, inner, outer), lhs.dtype)
    return _run(body, shape, groups * down * across)(ends - group_sizes, ends, lhs, d_out)


def _run(body: Any, shape: jax.ShapeDtypeStruct, programs: int) -> Any:
    return pl.pallas_call(body, out_shape=shape, grid=(programs,), compiler_params=_PARAMETERS)


grouped_matmul = differentiable(_product, _outer)
"""Multiplies each group's rows with its matrix; other rows hold anything."""
