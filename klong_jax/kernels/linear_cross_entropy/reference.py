"""Log-probabilities and entropies as they are written down: all logits, one softmax."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logprobs(
    hidden: Float[Array, "*n d"], embedding: Float[Array, "v d"], targets: Int[Array, "*n"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Log-probability of each target and entropy of each prediction."""
    accurate = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = hidden.astype(accurate) @ embedding.astype(accurate).T
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
