"""Grouped-query attention: causal over whole windows, and against a cache."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

_LOWEST = float(np.finfo(np.float32).min)
_MOST_BLOCKS = 8
_LEAST_BLOCK = 128


def masked_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k d"],
    mask: Bool[Array, "m t s"],
) -> Float[Array, "b t h d"]:
    """Softmax attention under an explicit mask.

    Args:
        query: Queries; h is a multiple of k.
        key: Keys.
        value: Values.
        mask: True where a query sees a key; m is b or 1. Every query must see a key.

    Returns:
        The attended values, in the dtype of `value`; the softmax is taken in float32.
    """
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", query, key).astype(jnp.float32)
    scores = jnp.where(mask[:, None], scores * query.shape[-1] ** -0.5, _LOWEST)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, value)


def causal_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t k d"],
    value: Float[Array, "b t k d"],
) -> Float[Array, "b t h d"]:
    """Causal attention in blocks of queries, each against the keys up to its end only.

    Nearly half of the scores are never computed, and no array of t by t exists.

    Args:
        query: Queries; h is a multiple of k.
        key: Keys.
        value: Values.
    """
    length = query.shape[1]
    block = max(_LEAST_BLOCK, -(-length // _MOST_BLOCKS))
    pieces = []
    for start in range(0, length, block):
        end = min(start + block, length)
        mask = jnp.arange(end)[None, None, :] <= jnp.arange(start, end)[None, :, None]
        pieces.append(masked_attention(query[:, start:end], key[:, :end], value[:, :end], mask))
    return jnp.concatenate(pieces, axis=1)
