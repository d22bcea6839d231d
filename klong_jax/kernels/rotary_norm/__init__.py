"""Heads of queries and keys, normalised and rotated to their positions in one go."""

from klong_jax.kernels.rotary_norm.api import BACKENDS, rotary_norm, takes

__all__ = ["BACKENDS", "rotary_norm", "takes"]
