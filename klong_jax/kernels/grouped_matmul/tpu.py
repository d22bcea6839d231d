"""Grouped matrix multiplication by the megablox Pallas kernels (Gale et al. 2022)."""

from functools import partial

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from klong_jax.kernels.grouped_matmul.gradient import differentiable

_LANES = 128
_MOST_ROWS, _MOST_COLUMNS = 512, 1024


def grouped_matmul(
    lhs: Float[Array, "m k"],
    rhs: Float[Array, "e k n"],
    group_sizes: Int[Array, "e"],
    *,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """Multiplies each group's rows with its matrix; other rows hold anything.

    Args:
        lhs: Rows, sorted by group.
        rhs: A matrix a group.
        group_sizes: Rows a group.
        interpret: Run the kernel on a CPU, step by step.
    """
    rows = lhs.shape[0]
    tile = _row_tile(rows, rhs.shape[0])
    padded = jnp.pad(lhs, ((0, -rows % tile), (0, 0)))
    run = differentiable(
        partial(_product, tile=tile, interpret=interpret),
        partial(_outer, tile=tile, interpret=interpret),
    )
    return run(padded, rhs, group_sizes.astype(jnp.int32))[:rows]


def _product(
    lhs: Float[Array, "m a"],
    rhs: Float[Array, "e k n"],
    group_sizes: Int[Array, "e"],
    *,
    transposed: bool,
    tile: int,
    interpret: bool,
) -> Float[Array, "m b"]:
    inner, outer = _tile(rhs.shape[1]), _tile(rhs.shape[2])
    tiling = (tile, outer, inner) if transposed else (tile, inner, outer)
    out: Array = gmm(
        lhs, rhs, group_sizes, lhs.dtype, tiling, transpose_rhs=transposed, interpret=interpret
    )
    return out


def _outer(
    lhs: Float[Array, "m k"],
    d_out: Float[Array, "m n"],
    group_sizes: Int[Array, "e"],
    *,
    tile: int,
    interpret: bool,
) -> Float[Array, "e k n"]:
    tiling = tile, _tile(lhs.shape[1]), _tile(d_out.shape[1])
    out: Array = tgmm(lhs.T, d_out, group_sizes, lhs.dtype, tiling, interpret=interpret)
    return out


def _row_tile(rows: int, groups: int) -> int:
    """At most about half a group, so that few tiles straddle two."""
    tile = _MOST_ROWS
    while tile > _LANES and tile * 2 * groups > rows:
        tile //= 2
    return tile


def _tile(columns: int) -> int:
    """Even tiles of whole lanes."""
    count = -(-columns // _MOST_COLUMNS)
    return -(-columns // (count * _LANES)) * _LANES
