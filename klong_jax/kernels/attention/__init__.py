"""Grouped-query attention of a window of queries on a prefix and itself, and against a cache."""

from klong_jax.kernels.attention.api import attention
from klong_jax.kernels.attention.cached import cached_attention
from klong_jax.kernels.attention.mask import MOST_SEGMENTS, SAVED, segment_starts

__all__ = ["MOST_SEGMENTS", "SAVED", "attention", "cached_attention", "segment_starts"]
