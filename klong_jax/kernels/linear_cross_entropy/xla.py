"""The logits of a tile as the compiler multiplies them, in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klong_jax.kernels.linear_cross_entropy.tiled import (
    Backend,
    Known,
    Rows,
    Softmax,
    Tile,
    cut,
    starts,
)


def _softmax(
    hidden: Float[Array, "n d"],
    embedding: Float[Array, "v d"],
    targets: Int[Array, "n"],
    tile: Tile,
) -> Softmax:
    lowest = jnp.finfo(jnp.promote_types(hidden.dtype, jnp.float32)).min

    def block(piece: tuple[Float[Array, "t d"], Int[Array, "t"]]) -> Softmax:
        states, wanted = piece

        def step(seen: Softmax, start: Int[Array, ""]) -> tuple[Softmax, None]:
            rows = Rows.at(embedding, start, tile)
            logits = jnp.where(rows.fresh, _logits(states, rows.values), lowest)
            top = jnp.maximum(seen.top, jnp.max(logits, axis=1))
            weights, shrunk = jnp.exp(logits - top[:, None]), jnp.exp(seen.top - top)
            here = rows.fresh & (jnp.arange(rows.fresh.size) == wanted[:, None] - rows.first)
            return Softmax(
                top,
                seen.total * shrunk + jnp.sum(weights, axis=1),
                seen.moment * shrunk + jnp.sum(weights * logits, axis=1),
                seen.target + jnp.sum(jnp.where(here, logits, 0), axis=1),
            ), None

        zeros = jnp.zeros(wanted.shape, lowest.dtype)
        start = Softmax(jnp.full_like(zeros, lowest), zeros, zeros, zeros)
        return jax.lax.scan(step, start, starts(embedding, tile))[0]

    found = jax.lax.map(block, (cut(hidden, tile), cut(targets, tile)))
    return Softmax(*(part.reshape(-1)[: targets.shape[0]] for part in found))


def _d_logits(
    states: Float[Array, "t d"], rows: Float[Array, "r d"], known: Known
) -> Float[Array, "t r"]:
    logprobs = _logits(states, rows) - known.log_total[:, None]
    # d log p(target) / d logits = [target] - p;  dH / d logits = -p (log p + H).
    drift = known.d_entropy[:, None] * (logprobs + known.entropy[:, None])
    here = jnp.arange(rows.shape[0]) == known.target[:, None]
    chosen = jnp.where(here, known.d_logprob[:, None], 0)
    return (chosen - jnp.exp(logprobs) * (known.d_logprob[:, None] + drift)).astype(states.dtype)


def _logits(states: Float[Array, "t d"], rows: Float[Array, "r d"]) -> Float[Array, "t r"]:
    accurate = jnp.promote_types(states.dtype, jnp.float32)
    return jnp.dot(states, rows.T, preferred_element_type=accurate)


BACKEND = Backend(_softmax, _d_logits)
