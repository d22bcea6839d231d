"""The SFT loss: cross-entropy summed over the tokens each window trains."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from klong_jax.kernels.linear_cross_entropy import token_logprobs
from klong_jax.models.decoder import Decoder, Params
from klong_jax.training.accumulate import LossFn
from klong_jax.training.batches import WindowBatch


def sft_loss(graph: nnx.GraphDef[Decoder], *, remat: bool) -> LossFn:
    """Sum of -log p over trained tokens.

    Divide by the number of trained tokens of the global batch: every token is trained in exactly
    one window, so the result does not depend on how a trajectory was split.
    """

    def loss(
        params: Params, batch: WindowBatch
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        decoder = nnx.merge(graph, params)
        # The whole row goes through the decoder: an even length keeps the matrices aligned.
        hidden = decoder.apply(jnp.asarray(batch.tokens), remat=remat)[:, :-1]
        logprobs, entropy = token_logprobs(
            hidden, decoder.output_embedding, jnp.asarray(batch.tokens)[:, 1:]
        )
        weight = batch.trained[:, 1:] * batch.weight[:, None]
        return -jnp.sum(weight * logprobs), {"entropy": jnp.sum(weight * entropy)}

    return loss
