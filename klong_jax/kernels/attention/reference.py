"""Attention as it is written down: every score, one softmax."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from klong_jax.kernels.attention.mask import WindowMask


def attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k d"],
    mask: WindowMask,
    scale: float,
) -> Float[Array, "b t h d"]:
    """Attends; in float64 if the inputs are."""
    accurate = jnp.promote_types(query.dtype, jnp.float32)
    groups = query.shape[2] // key.shape[2]
    keys, values = (jnp.repeat(x.astype(accurate), groups, axis=2) for x in (key, value))
    scores = jnp.einsum("bthd,bshd->bhts", query.astype(accurate), keys) * scale
    seen = mask.visible(mask.query_positions(query.shape[1]), jnp.arange(key.shape[1]))[:, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(accurate).min)
    weights = jnp.where(seen, jnp.exp(scores - top), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    return jnp.einsum("bhts,bshd->bthd", weights, values).astype(value.dtype)
