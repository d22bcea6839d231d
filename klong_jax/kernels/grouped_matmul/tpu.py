"""Grouped matrix multiplication by the megablox Pallas kernels (Gale et al. 2022)."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

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
    out: Array = _product(padded, rhs, group_sizes.astype(jnp.int32), tile, interpret)
    return out[:rows]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(
    lhs: Float[Array, "m k"],
    rhs: Float[Array, "e k n"],
    group_sizes: Int[Array, "e"],
    tile: int,
    interpret: bool,
) -> Float[Array, "m n"]:
    tiling = tile, _tile(rhs.shape[1]), _tile(rhs.shape[2])
    return gmm(lhs, rhs, group_sizes, lhs.dtype, tiling, interpret=interpret)


Residuals = tuple[Float[Array, "m k"], Float[Array, "e k n"], Int[Array, "e"]]


def _forward(
    lhs: Float[Array, "m k"],
    rhs: Float[Array, "e k n"],
    group_sizes: Int[Array, "e"],
    tile: int,
    interpret: bool,
) -> tuple[Float[Array, "m n"], Residuals]:
    return _product(lhs, rhs, group_sizes, tile, interpret), (lhs, rhs, group_sizes)


def _backward(
    tile: int, interpret: bool, residuals: Residuals, d_out: Float[Array, "m n"]
) -> tuple[Float[Array, "m k"], Float[Array, "e k n"], None]:
    lhs, rhs, group_sizes = residuals
    inner, outer = _tile(rhs.shape[1]), _tile(rhs.shape[2])
    d_lhs = gmm(
        d_out,
        rhs,
        group_sizes,
        lhs.dtype,
        (tile, outer, inner),
        transpose_rhs=True,
        interpret=interpret,
    )
    d_rhs = tgmm(lhs.T, d_out, group_sizes, rhs.dtype, (tile, inner, outer), interpret=interpret)
    return d_lhs, d_rhs, None


_product.defvjp(_forward, _backward)


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
