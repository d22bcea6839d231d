"""A moving average of the parameters, kept beside them by the optimiser."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from klong_jax.models.decoder import Params
from klong_jax.training.frozen import joined, restricted


class Averaged(NamedTuple):
    """The state of an optimiser that averages.

    Attributes:
        inner: The state of the optimiser itself.
        average: The averaged parameters, those that are learnt, in float32.
    """

    inner: Any
    average: Params


def with_average(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """An optimiser that also averages the parameters it has made, from the first ones on.

    Args:
        optimizer: Makes the updates; they stay what they are.
        decay: What the average keeps of itself at each step.
    """

    def init(params: Params) -> Averaged:
        average = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return Averaged(optimizer.init(params), average)

    def update(updates: Any, state: Averaged, params: Params) -> tuple[Any, Averaged]:
        updates, inner = optimizer.update(updates, state.inner, params)
        # A difference is added, so that what does not change is averaged to itself.
        average = jax.tree.map(
            lambda old, new: old + (1 - decay) * (new.astype(jnp.float32) - old),
            state.average,
            optax.apply_updates(params, updates),
        )
        return updates, Averaged(inner, average)

    return optax.GradientTransformation(init, update)


def served_params(params: Params, opt_state: Any) -> Params:
    """What a policy acts with once it is trained: the average if one was kept, else `params`."""
    if not isinstance(opt_state, Averaged):
        return params
    average = opt_state.average

    def served(mean: Array, like: Array) -> Array:
        # It may be in the host's memory, where nothing is computed.
        held: Array = jax.device_put(mean, mean.sharding.with_memory_kind("device"))
        return held.astype(like.dtype)

    return joined(params, jax.tree.map(served, average, restricted(params, average)))
