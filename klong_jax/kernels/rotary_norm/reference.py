"""The formula."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rotary_norm(
    heads: Float[Array, "b t h d"],
    scale: Float[Array, "d"],
    cos: Float[Array, "b t half"],
    sin: Float[Array, "b t half"],
    epsilon: float,
) -> Float[Array, "b t h d"]:
    """Normalises, scales and rotates."""
    wide = heads.astype(jnp.promote_types(heads.dtype, jnp.float32))
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    first, second = jnp.split(wide * jax.lax.rsqrt(mean + epsilon) * scale, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(heads.dtype)
