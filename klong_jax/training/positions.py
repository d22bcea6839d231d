"""Whether loss grows late in a trajectory: means by where tokens stand in it."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def loss_by_position(
    losses: Float[Array, "b s"],
    weights: Float[Array, "b s"],
    positions: Int[Array, "b s"],
    bounds: Sequence[int],
) -> Float[Array, "2 k"]:
    """Sums of losses, and of their weights, by where in its trajectory a token stands.

    Sums of micro-batches add up; the first row divided by the second is each part's mean.

    Args:
        losses: Of each token.
        weights: What each counts, 0 where it is not trained.
        positions: Of each token in its trajectory.
        bounds: Where the second, third and further parts begin, in order; there are k - 1.
    """
    part = jnp.searchsorted(jnp.asarray(bounds), positions, side="right")
    inside = part[..., None] == jnp.arange(len(bounds) + 1)
    return jnp.einsum("nbs,bsk->nk", jnp.stack([losses * weights, weights]), inside.astype(float))


def position_row(sums: Float[Array, "2 k"], bounds: Sequence[int]) -> dict[str, float]:
    """The means of `loss_by_position` for the metrics, by where each part begins.

    Returns:
        `loss_from_0` and so on, without the parts in which nothing was trained.
    """
    starts = (0, *bounds)
    return {
        f"loss_from_{start}": float(total) / float(weight)
        for start, total, weight in zip(starts, *sums, strict=True)
        if weight > 0
    }
