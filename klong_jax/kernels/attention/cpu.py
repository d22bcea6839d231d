"""Attention in blocks of queries, each against the keys up to its end only.

Memory is linear in the length, forward and backward: of the scores only one block of rows exists
at a time, and the backward pass computes them again (Dao et al. 2022). Blocks are scanned within a
few stripes that are unrolled, each with keys up to its own end, so that nearly half of the scores
of a causal window are never computed.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from klong_jax.kernels.attention.mask import SAVED, WindowMask

_BLOCK = 128
_MOST_STRIPES = 8

Blocks = Float[Array, "n b k r d"]
"""Queries in n blocks; of a head of keys the r rows of a block are its heads' queries in turn."""
Keys = Float[Array, "b k s d"]


def attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k d"],
    mask: WindowMask,
    scale: float,
) -> Float[Array, "b t h d"]:
    """Attends; the softmax is taken in float32 or, if the inputs are so, in float64."""
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    count = max(1, -(-length // _BLOCK))
    block = -(-length // count)
    padded = jnp.pad(query * scale, ((0, 0), (0, count * block - length), (0, 0), (0, 0)))
    blocks = padded.reshape(batch, count, block, kv_heads, groups, width)
    blocks = blocks.transpose(1, 0, 3, 4, 2, 5).reshape(count, batch, kv_heads, -1, width)
    keys, values = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    positions = jnp.pad(mask.query_positions(length), (0, count * block - length))
    rows = jnp.tile(positions.reshape(count, block), (1, groups))
    out = _attend(blocks, keys, values, mask, rows, block)
    out = out.reshape(count, batch, kv_heads, groups, block, width).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(batch, count * block, heads, width)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    query: Blocks, key: Keys, value: Keys, mask: WindowMask, rows: Int[Array, "n r"], block: int
) -> Blocks:
    return _forward(query, key, value, mask, rows, block)[0]


Totals = Float[Array, "n b k r 1"]
Residuals = tuple[Blocks, Keys, Keys, WindowMask, Int[Array, "n r"], Blocks, Totals]


def _forward(
    query: Blocks, key: Keys, value: Keys, mask: WindowMask, rows: Int[Array, "n r"], block: int
) -> tuple[Blocks, Residuals]:
    parts = []
    for first, last, end in _stripes(query.shape[0], key.shape[2], mask, block):
        run = partial(_one_forward, keys=(key[:, :, :end], value[:, :, :end]), mask=mask)
        parts.append(jax.lax.map(run, (rows[first:last], query[first:last])))
    out, log_total = (
        checkpoint_name(jnp.concatenate(part), SAVED) for part in zip(*parts, strict=True)
    )
    return out, (query, key, value, mask, rows, out, log_total)


def _backward(
    block: int, residuals: Residuals, d_out: Blocks
) -> tuple[Blocks, Keys, Keys, None, None]:
    query, key, value, mask, rows, out, log_total = residuals
    drift = jnp.sum((out * d_out).astype(log_total.dtype), axis=-1, keepdims=True)
    pieces = rows, query, d_out, log_total, drift
    d_key, d_value = jnp.zeros(key.shape, drift.dtype), jnp.zeros(value.shape, drift.dtype)
    d_query = []
    for first, last, end in _stripes(query.shape[0], key.shape[2], mask, block):
        run = partial(_one_backward, keys=(key[:, :, :end], value[:, :, :end]), mask=mask)
        sums = jnp.zeros_like(d_key[:, :, :end]), jnp.zeros_like(d_value[:, :, :end])
        sums, part = jax.lax.scan(run, sums, tuple(piece[first:last] for piece in pieces))
        # Padded, not added at an index: that crashes XLA's CPU compiler of JAX 0.11 under a mesh.
        rest = ((0, 0), (0, 0), (0, key.shape[2] - end), (0, 0))
        d_key, d_value = d_key + jnp.pad(sums[0], rest), d_value + jnp.pad(sums[1], rest)
        d_query.append(part)
    return (
        jnp.concatenate(d_query),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        None,
        None,
    )


_attend.defvjp(_forward, _backward)


def _stripes(count: int, keys: int, mask: WindowMask, block: int) -> Iterator[tuple[int, int, int]]:
    """First block, block after the last, and keys up to its end, of each stripe."""
    growing = mask.causal and mask.positions is None
    step = -(-count // _MOST_STRIPES) if growing else count
    for first in range(0, count, step):
        last = min(first + step, count)
        yield first, last, min(keys, mask.prefix + last * block) if growing else keys


def _scores(
    positions: Int[Array, "r"], query: Float[Array, "b k r d"], key: Keys, mask: WindowMask
) -> Float[Array, "b k r s"]:
    accurate = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bkrd,bksd->bkrs", query, key, preferred_element_type=accurate)
    seen = mask.visible(positions, jnp.arange(key.shape[2]))
    return jnp.where(seen[:, None], scores, -jnp.inf)


def _one_forward(
    piece: tuple[Int[Array, "r"], Float[Array, "b k r d"]],
    keys: tuple[Keys, Keys],
    mask: WindowMask,
) -> tuple[Float[Array, "b k r d"], Float[Array, "b k r 1"]]:
    key, value = keys
    scores = _scores(*piece, key, mask)
    # Not -inf where a query sees nothing: the weights are then exp(-inf), and not inf - inf.
    top = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total > 0, total, 1)
    product = partial(jnp.einsum, preferred_element_type=scores.dtype)
    out = product("bkrs,bksd->bkrd", weights.astype(value.dtype), value) / total
    return out.astype(value.dtype), top + jnp.log(total)


def _one_backward(
    sums: tuple[Keys, Keys],
    piece: tuple[Array, Array, Array, Array, Array],
    keys: tuple[Keys, Keys],
    mask: WindowMask,
) -> tuple[tuple[Keys, Keys], Float[Array, "b k r d"]]:
    key, value = keys
    positions, query, d_out, log_total, drift = piece
    weights = jnp.exp(_scores(positions, query, key, mask) - log_total)
    product = partial(jnp.einsum, preferred_element_type=weights.dtype)
    d_value = product("bkrs,bkrd->bksd", weights.astype(value.dtype), d_out)
    d_weights = product("bkrd,bksd->bkrs", d_out, value)
    d_scores = (weights * (d_weights - drift)).astype(key.dtype)
    d_key = product("bkrs,bkrd->bksd", d_scores, query)
    d_query = product("bkrs,bksd->bkrd", d_scores, key)
    return (sums[0] + d_key, sums[1] + d_value), d_query.astype(query.dtype)
