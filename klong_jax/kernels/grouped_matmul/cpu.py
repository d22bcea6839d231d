"""Grouped matrix multiplication as a loop over tiles of rows that lie in one group each.

XLA's own ragged product multiplies every row with every matrix here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klong_jax.kernels.grouped_matmul.gradient import differentiable

_LEAST_TILE, _MOST_TILE = 8, 256


class Tiles(NamedTuple):
    """Tiles in the order of their rows; those that are left over hold none.

    Attributes:
        group: The tile's group.
        start: Its first row.
        rows: How many of its rows are of the group.
    """

    group: Int[Array, "n"]
    start: Int[Array, "n"]
    rows: Int[Array, "n"]


def _product(
    lhs: Float[Array, "m a"],
    rhs: Float[Array, "e k n"],
    group_sizes: Int[Array, "e"],
    *,
    transposed: bool,
) -> Float[Array, "m b"]:
    size = _tile_size(lhs.shape[0], rhs.shape[0])
    padded = _padded(lhs, size)
    width, how = (rhs.shape[1], "tn,kn->tk") if transposed else (rhs.shape[2], "tk,kn->tn")

    def one(out: Float[Array, "p b"], tile: Tiles) -> tuple[Float[Array, "p b"], None]:
        rows = _rows(padded, tile, size)
        made = jnp.einsum(how, rows, rhs[tile.group]).astype(out.dtype)
        # Rows after the tile's own are zeros here, which the next tile overwrites.
        return jax.lax.dynamic_update_slice_in_dim(out, made, tile.start, axis=0), None

    zeros = jnp.zeros((padded.shape[0], width), lhs.dtype)
    return jax.lax.scan(one, zeros, tiles(group_sizes, lhs.shape[0], size))[0][: lhs.shape[0]]


def _outer(
    lhs: Float[Array, "m k"], d_out: Float[Array, "m n"], group_sizes: Int[Array, "e"]
) -> Float[Array, "e k n"]:
    size = _tile_size(lhs.shape[0], group_sizes.shape[0])
    rows, d_rows = _padded(lhs, size), _padded(d_out, size)
    accurate = jnp.promote_types(lhs.dtype, jnp.float32)

    def one(total: Float[Array, "e k n"], tile: Tiles) -> tuple[Float[Array, "e k n"], None]:
        pair = _rows(rows, tile, size), _rows(d_rows, tile, size)
        made = jnp.einsum("tk,tn->kn", *pair, preferred_element_type=accurate)
        return total.at[tile.group].add(made), None

    zeros = jnp.zeros((group_sizes.shape[0], lhs.shape[1], d_out.shape[1]), accurate)
    return jax.lax.scan(one, zeros, tiles(group_sizes, lhs.shape[0], size))[0]


def tiles(group_sizes: Int[Array, "e"], rows: int, size: int) -> Tiles:
    """Cuts each group from its own first row on.

    Args:
        group_sizes: Rows a group.
        rows: At least their sum.
        size: Rows a tile.
    """
    groups = group_sizes.shape[0]
    ends, counts = jnp.cumsum(group_sizes), -(-group_sizes // size)
    last = jnp.cumsum(counts)
    index = jnp.arange(rows // size + groups)
    group = jnp.minimum(jnp.searchsorted(last, index, side="right"), groups - 1)
    start = ends[group] - group_sizes[group] + (index - last[group] + counts[group]) * size
    return Tiles(group, jnp.minimum(start, ends[group]), jnp.clip(ends[group] - start, 0, size))


def _rows(padded: Float[Array, "p a"], tile: Tiles, size: int) -> Float[Array, "t a"]:
    rows = jax.lax.dynamic_slice_in_dim(padded, tile.start, size)
    return jnp.where((jnp.arange(size) < tile.rows)[:, None], rows, 0)


def _padded(rows: Float[Array, "m a"], size: int) -> Float[Array, "p a"]:
    return jnp.pad(rows, ((0, size), (0, 0)))


def _tile_size(rows: int, groups: int) -> int:
    """About half a group, a power of two: little of a group's last tile is empty."""
    half = max(1, rows // (2 * groups))
    return min(_MOST_TILE, max(_LEAST_TILE, 1 << half.bit_length() - 1))


grouped_matmul = differentiable(_product, _outer)
"""Multiplies each group's rows with its matrix; all other rows are zeros."""
