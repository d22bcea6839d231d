"""Rotary positions (Su et al. 2021), on a part of each head and with stretched frequencies."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from klong_jax.kernels.rotary_norm import rotary_norm, takes
from klong_jax.models.config import DecoderConfig


def rotate(
    x: Float[Array, "b t n d"], positions: Int[Array, "b t"], config: DecoderConfig
) -> Float[Array, "b t n d"]:
    """Rotates the halves of the first `rotary_dim` dimensions of each head against each other.

    Angles are taken in float32, or in float64 for heads of that precision.
    """
    precision = jnp.promote_types(x.dtype, jnp.float32)
    angles = positions[..., None, None].astype(precision) * frequencies(config).astype(precision)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second, rest = jnp.split(x, [config.rotary_dim // 2, config.rotary_dim], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, rest], axis=-1)


def normed_and_rotated(
    norm: Any, x: Float[Array, "b t n d"], positions: Int[Array, "b t"], config: DecoderConfig
) -> Float[Array, "b t n d"]:
    """Normalises each head and rotates it, by one kernel where there is one."""
    if not takes(x, config.rotary_dim):
        return rotate(norm(x), positions, config)
    angles = positions[..., None].astype(jnp.float32) * frequencies(config).astype(jnp.float32)
    return rotary_norm(
        x, norm.scale[...], jnp.cos(angles), jnp.sin(angles), epsilon=config.norm_eps
    )


def frequencies(config: DecoderConfig) -> Float[np.ndarray, " half"]:
    """Radians a position for each pair of dimensions."""
    half = config.rotary_dim // 2
    plain = config.rope_theta ** (-np.arange(half) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    # Full turns in the original context: few are stretched, many are not, between them both mix.
    turns = scaling.original_length * plain / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (kept + (1 - kept) / scaling.factor)
