"""The policy-gradient loss: clipped ratio, truncated importance weight, KL to a reference."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from klong_jax.kernels.linear_cross_entropy import token_logprobs
from klong_jax.models.config import Remat
from klong_jax.models.decoder import Decoder
from klong_jax.training.batches import WindowBatch
from klong_jax.training.loss import Summed, WindowLoss


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


def rl_loss(
    graph: nnx.GraphDef[Decoder], config: RlLossConfig, *, remat: Remat, scan_layers: bool = True
) -> WindowLoss:
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
        scan_layers: Whether layers are one compiled loop.
    """
    return WindowLoss(graph, partial(_surrogate, config), remat, scan_layers)


def _surrogate(
    config: RlLossConfig,
    hidden: Float[Array, "b t w"],
    embedding: Float[Array, "v w"],
    targets: WindowBatch,
) -> Summed:
    logprobs, entropy = token_logprobs(
        hidden / config.temperature, embedding, jnp.asarray(targets.tokens)
    )
    mask = targets.trained
    advantage = targets.token_weight
    proximal = jax.lax.stop_gradient(logprobs)
    mismatch = mask * (proximal - targets.behaviour_logprobs)
    importance = jnp.minimum(jnp.exp(mismatch), config.importance_cap)
    ratio = jnp.exp(logprobs - proximal)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
    gap = mask * (targets.reference_logprobs - logprobs)
    kl = jnp.sum(mask * (jnp.exp(gap) - 1 - gap)) if config.kl_beta > 0 else jnp.zeros(())
    logs = {
        "entropy": jnp.sum(mask * entropy),
        "mismatch": jnp.sum(jnp.abs(mismatch)),
        "trained_tokens": jnp.sum(mask),
        "kl": kl,
    }
    return -jnp.sum(mask * importance * surrogate) + config.kl_beta * kl, logs
