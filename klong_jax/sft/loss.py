"""The SFT loss: cross-entropy summed over the tokens each window trains."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from klong_jax.kernels.linear_cross_entropy import linear_cross_entropy
from klong_jax.models.config import Remat
from klong_jax.models.decoder import Decoder
from klong_jax.parallel.rules import constrain
from klong_jax.training.batches import WindowBatch
from klong_jax.training.loss import Summed, WindowLoss


def sft_loss(graph: nnx.GraphDef[Decoder], *, remat: Remat, scan_layers: bool = True) -> WindowLoss:
    """Sum of -log p over trained tokens.

    Divide by the number of trained tokens of the global batch: every token is trained in exactly
    one window, so the result does not depend on how a trajectory was split.
    """
    return WindowLoss(graph, _cross_entropy, remat, scan_layers)


def token_losses(graph: nnx.GraphDef[Decoder]) -> WindowLoss:
    """The SFT loss, and in its logs what it is the sum of.

    `token_losses`, float32[b, t], holds -log p of each trained token at the place before the
    token's own, where it is predicted, and zeros. It does not add up over micro-batches, so this is
    for judging, not for training.
    """
    return WindowLoss(graph, _each_token, "none")


def _cross_entropy(
    hidden: Float[Array, "b t w"], embedding: Float[Array, "v w"], targets: WindowBatch
) -> Summed:
    weights = jnp.asarray(targets.trained * targets.token_weight)
    out = linear_cross_entropy(hidden, embedding, jnp.asarray(targets.tokens), weights)
    return out.weighted_sum, {"entropy": jnp.sum(weights * out.entropies)}


def _each_token(
    hidden: Float[Array, "b t w"], embedding: Float[Array, "v w"], targets: WindowBatch
) -> Summed:
    weights = jnp.asarray(targets.trained * targets.token_weight)
    out = linear_cross_entropy(hidden, embedding, jnp.asarray(targets.tokens), weights)
    losses = constrain(-weights * out.logprobs, None, None)
    return out.weighted_sum, {"token_losses": losses}
