"""Grouped matrix multiplication as it is written down: every row times the matrix of its group."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(
    lhs: Float[Array, "m k"], rhs: Float[Array, "e k n"], group_sizes: Int[Array, "e"]
) -> Float[Array, "m n"]:
    """Multiplies; in float64 if the inputs are."""
    accurate = jnp.promote_types(lhs.dtype, jnp.float32)
    rows = jnp.arange(lhs.shape[0])[:, None]
    ends = jnp.cumsum(group_sizes)
    member = (rows >= ends - group_sizes) & (rows < ends)
    wide = lhs.astype(accurate), rhs.astype(accurate)
    return jnp.einsum("me,mk,ekn->mn", member.astype(accurate), *wide).astype(lhs.dtype)
