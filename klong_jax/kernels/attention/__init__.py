"""Grouped-query attention of a window of queries on a prefix and itself, and against a cache."""

from klong_jax.kernels.attention.api import attention
from klong_jax.kernels.attention.cached import cached_attention
from klong_jax.kernels.attention.mask import SAVED, segment_starts

__all__ = ["SAVED", "attention", "cached_attention", "segment_starts"]
