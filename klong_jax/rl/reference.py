"""Log-probabilities under the policy that RL starts from, for the divergence from it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from klong_jax.kernels.linear_cross_entropy import token_logprobs
from klong_jax.models.decoder import Decoder, Params
from klong_jax.parallel.rules import constrain
from klong_jax.training.batches import SharedBatch, WindowBatch, place_batch
from klong_jax.training.loss import Summed, WindowLoss
from klong_jax.training.shared_prefix import constrain_prefix

Refer = Callable[[WindowBatch | SharedBatch], WindowBatch | SharedBatch]
"""Fills in a micro-batch's log-probabilities under the reference policy."""

_LOGPROBS = "logprobs"


def make_refer(graph: nnx.GraphDef[Decoder], params: Params, temperature: float) -> Refer:
    """Compiles the reference policy.

    Args:
        graph: The decoder.
        params: The reference policy's parameters.
        temperature: Of the sampling, as in the loss.
    """
    loss = WindowLoss(graph, partial(_logprobs, temperature), "none")

    @jax.jit
    def whole(params: Params, batch: WindowBatch) -> Array:
        return _shifted(loss(params, batch)[1][_LOGPROBS])

    @jax.jit
    def read(params: Params, prefix: WindowBatch) -> Any:
        (state, _), logs = loss.read(params, prefix, trained=True)
        return constrain_prefix(state), _shifted(logs[_LOGPROBS])

    @jax.jit
    def after(params: Params, state: Any, batch: WindowBatch) -> Array:
        return constrain(loss.after(params, state, batch)[1][_LOGPROBS], "batch", "length")

    def refer(batch: WindowBatch | SharedBatch) -> WindowBatch | SharedBatch:
        if isinstance(batch, WindowBatch):
            batch = place_batch(batch)
            return replace(batch, reference_logprobs=whole(params, batch))
        prefix = place_batch(batch.prefix)
        state, known = read(params, prefix)
        windows = []
        for window in map(place_batch, batch.windows):
            windows.append(replace(window, reference_logprobs=after(params, state, window)))
        return replace(
            batch, prefix=replace(prefix, reference_logprobs=known), windows=tuple(windows)
        )

    return refer


def _logprobs(
    temperature: float,
    hidden: Float[Array, "b t w"],
    embedding: Float[Array, "v w"],
    targets: WindowBatch,
) -> Summed:
    logprobs, _ = token_logprobs(hidden / temperature, embedding, jnp.asarray(targets.tokens))
    return jnp.zeros(()), {_LOGPROBS: logprobs}


def _shifted(logprobs: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """From each token's successor to each token; nothing predicts the first."""
    return constrain(jnp.pad(logprobs[:, :-1], ((0, 0), (1, 0))), "batch", "length")
