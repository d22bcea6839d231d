"""Attention of new tokens against a key-value cache whose rows are at different lengths."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCK = 128


def cached_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k d"],
    positions: Int[Array, "b t"],
    *,
    scale: float | None = None,
) -> Float[Array, "b t h d"]:
    """Attends; a query sees the keys up to its own position.

    It is left to the compiler to spread it over a mesh. Many queries are taken in blocks, one
    after another, so that memory is linear in the length; there is no such care for gradients.

    Args:
        query: Queries; h is a multiple of k.
        key: Keys of the cache.
        value: Values of the cache.
        positions: Where each query stands in its row, from 0.
        scale: What scores are multiplied with; d ** -0.5 if None.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attend = partial(_attend, key=key, value=value, scale=scale)
    length = query.shape[1]
    if length <= _BLOCK:
        return attend((query, positions))
    pad = -length % _BLOCK
    queries = jnp.pad(query, ((0, 0), (0, pad), (0, 0), (0, 0)))
    places = jnp.pad(positions, ((0, 0), (0, pad)))

    def blocks(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, _BLOCK, *x.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(attend, (blocks(queries), blocks(places))).swapaxes(0, 1)
    return out.reshape(queries.shape)[:, :length]


def _attend(
    piece: tuple[Float[Array, "b t h d"], Int[Array, "b t"]],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k d"],
    scale: float,
) -> Float[Array, "b t h d"]:
    query, positions = piece
    batch, length, heads, width = query.shape
    accurate = jnp.promote_types(query.dtype, jnp.float32)
    product = partial(jnp.einsum, preferred_element_type=accurate)
    grouped = query.reshape(batch, length, key.shape[2], -1, width)
    scores = product("btkgd,bskd->bkgts", grouped, key)
    seen = jnp.arange(key.shape[1]) <= positions[:, None, None, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores * scale, -jnp.inf), axis=-1)
    out = product("bkgts,bskd->btkgd", weights.astype(value.dtype), value)
    return out.reshape(batch, length, heads, width).astype(value.dtype)
