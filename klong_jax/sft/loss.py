"""The SFT loss: cross-entropy summed over the tokens each window trains."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from klong_jax.kernels.linear_cross_entropy import linear_cross_entropy
from klong_jax.models.config import Remat
from klong_jax.models.decoder import Decoder, Params
from klong_jax.models.routing import EXPERT_LOADS
from klong_jax.training.accumulate import LossFn
from klong_jax.training.batches import WindowBatch, real_tokens


def sft_loss(graph: nnx.GraphDef[Decoder], *, remat: Remat) -> LossFn:
    """Sum of -log p over trained tokens.

    Divide by the number of trained tokens of the global batch: every token is trained in exactly
    one window, so the result does not depend on how a trajectory was split.
    """

    def loss(params: Params, batch: WindowBatch) -> tuple[Float[Array, ""], dict[str, Array]]:
        decoder = nnx.merge(graph, params)
        tokens = jnp.asarray(batch.tokens)
        # Whole rows throughout, the last prediction at no weight: lengths stay even and divisible.
        hidden, loads = decoder.apply_with_loads(
            tokens, remat=remat, counted=real_tokens(jnp.asarray(batch.trained))
        )
        weights = jnp.pad(batch.trained[:, 1:] * batch.weight[:, None], ((0, 0), (0, 1)))
        out = linear_cross_entropy(
            hidden, decoder.output_embedding, jnp.roll(tokens, -1, axis=1), weights
        )
        logs = {"entropy": jnp.sum(weights * out.entropies)}
        return out.weighted_sum, logs if loads is None else {**logs, EXPERT_LOADS: loads}

    return loss
