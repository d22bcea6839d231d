"""Rows sorted by group, each group times a matrix of its own."""

from klong_jax.kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
