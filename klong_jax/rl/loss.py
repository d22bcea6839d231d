"""The policy-gradient loss: clipped ratio, truncated importance weight, KL to a reference."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from klong_jax.kernels.linear_cross_entropy import token_logprobs
from klong_jax.models.config import Remat
from klong_jax.models.decoder import Decoder, Loads, Params
from klong_jax.models.routing import EXPERT_LOADS
from klong_jax.training.accumulate import LossFn
from klong_jax.training.batches import WindowBatch, real_tokens


@dataclass(frozen=True)
class RlLossConfig:
    """Numbers of the loss.

    Attributes:
        clip: The ratio to the proximal policy is kept within [1 - clip, 1 + clip].
        importance_cap: Largest weight for behaviour-policy mismatch.
        kl_beta: Weight of the KL to the reference; 0 computes no reference.
        temperature: Of the sampling. The policy that acts is the tempered one, so that is the one
            whose probabilities are trained.
    """

    clip: float = 0.2
    importance_cap: float = 2.0
    kl_beta: float = 0.0
    temperature: float = 1.0


def window_logprobs(
    graph: nnx.GraphDef[Decoder],
    params: Params,
    batch: WindowBatch,
    *,
    temperature: float,
    remat: Remat,
) -> tuple[Float[Array, "b s"], Float[Array, "b s"], Loads]:
    """Log-probability of each token after the first, entropy of each prediction, experts' loads.

    The first two are those of the policy that samples with the given temperature.
    """
    decoder = nnx.merge(graph, params)
    tokens = jnp.asarray(batch.tokens)
    # Whole rows throughout, the last prediction cut off: lengths stay even and divisible.
    hidden, loads = decoder.apply_with_loads(
        tokens, remat=remat, counted=real_tokens(jnp.asarray(batch.trained))
    )
    logprobs, entropy = token_logprobs(
        hidden / temperature, decoder.output_embedding, jnp.roll(tokens, -1, axis=1)
    )
    return logprobs[:, :-1], entropy[:, :-1], loads


def rl_loss(graph: nnx.GraphDef[Decoder], config: RlLossConfig, *, remat: Remat) -> LossFn:
    """-sum over windows and tokens of mask * w * A * clipped ratio, plus beta * KL.

    A batch takes one update, so the proximal policy is the current one with its gradient stopped:
    the ratio is 1 in value and its gradient is the policy gradient. w = min(pi_proximal /
    pi_behaviour, cap), gradient stopped, corrects for the engine's numerics and for stale samples
    (truncated importance sampling). Windows of a rollout sum, so splitting does not change the
    gradient; divide by N planned rollouts and the stage's constant C. The KL is the k3 estimator
    (Schulman 2020) against the batch's reference log-probabilities.

    Args:
        graph: The decoder.
        config: Numbers.
        remat: What each layer keeps for the backward pass.
    """

    def loss(params: Params, batch: WindowBatch) -> tuple[Float[Array, ""], dict[str, Array]]:
        logprobs, entropy, loads = window_logprobs(
            graph, params, batch, temperature=config.temperature, remat=remat
        )
        mask = batch.trained[:, 1:]
        advantage = batch.weight[:, None]
        proximal = jax.lax.stop_gradient(logprobs)
        mismatch = mask * (proximal - batch.behaviour_logprobs[:, 1:])
        importance = jnp.minimum(jnp.exp(mismatch), config.importance_cap)
        ratio = jnp.exp(logprobs - proximal)
        clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
        surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
        gap = mask * (batch.reference_logprobs[:, 1:] - logprobs)
        kl = jnp.sum(mask * (jnp.exp(gap) - 1 - gap)) if config.kl_beta > 0 else jnp.zeros(())
        logs = {
            "entropy": jnp.sum(mask * entropy),
            "mismatch": jnp.sum(jnp.abs(mismatch)),
            "trained_tokens": jnp.sum(mask),
            "kl": kl,
        }
        if loads is not None:
            logs[EXPERT_LOADS] = loads
        return -jnp.sum(mask * importance * surrogate) + config.kl_beta * kl, logs

    return loss
