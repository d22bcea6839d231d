"""Which experts a token goes to and how much each counts; and how evenly they are loaded."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klong_jax.models.config import MoeConfig

EXPERT_LOADS = "expert_loads"
"""The log under which a loss gives the tokens that each expert of each layer was given."""

_TINY = 1e-20


def route(
    logits: Float[Array, "n e"], bias: Float[Array, " e"] | None, config: MoeConfig
) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """Weights and numbers of the experts of each token.

    Args:
        logits: The router's, in float32 at least.
        bias: Added to the scores for the choice only; no gradient reaches it.
        config: The mixture.
    """
    if config.router == "softmax":
        scores = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
    wanted = scores if bias is None else scores + bias
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(wanted), config.top_k)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.normalise_top_k:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + _TINY)
    return weights * config.scaling_factor, chosen


def expert_load(
    chosen: Int[Array, "n k"], counted: Bool[Array, " n"] | None, num_experts: int
) -> Int[Array, " e"]:
    """How many tokens chose each expert, of those that are counted; of all if None."""
    hits = jax.nn.one_hot(chosen, num_experts, dtype=jnp.int32)
    if counted is not None:
        hits *= counted[:, None, None]
    return jnp.sum(hits, axis=(0, 1))


def load_statistics(loads: Float[Array, "l e"]) -> dict[str, Float[Array, ""]]:
    """How evenly tokens were spread over experts, for the metrics.

    Args:
        loads: Tokens of each expert in each layer, on any scale.

    Returns:
        `expert_entropy`, the mean over layers of the entropy of the load as a share of the largest
        possible, and `expert_max_load`, the fullest expert of any layer in units of a fair share:
        both are 1 when every expert has the same.
    """
    count = loads.shape[-1]
    shares = loads / jnp.maximum(loads.sum(axis=-1, keepdims=True), 1)
    entropy = -jnp.sum(jax.scipy.special.xlogy(shares, shares), axis=-1)
    return {
        "expert_entropy": jnp.mean(entropy) / jnp.log(count),
        "expert_max_load": jnp.max(shares) * count,
    }


def balance_routers(params: Any, loads: Float[Array, "l e"], rate: float) -> Any:
    """Parameters whose routers' biases answer a step that loaded the experts so.

    The bias of an expert that had more than its share falls by `rate`, of one that had less it
    rises: load evens out with no term in the loss (Wang et al. 2024).

    Args:
        params: The decoder's.
        loads: Tokens of each expert in each layer, on any scale.
        rate: What a bias moves by.
    """
    share = loads.mean(axis=-1, keepdims=True)

    def move(path: tuple[Any, ...], leaf: Array) -> Array:
        if not is_router_bias(path):
            return leaf
        return leaf + rate * jnp.sign(share - loads).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(move, params)


def is_router_bias(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is the routers' bias, which no gradient reaches."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return names[-2:] == ["router", "bias"]
