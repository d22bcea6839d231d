"""Log-probabilities of target tokens from hidden states, without a full table of logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logprobs(
    hidden: Float[Array, "b t d"],
    embedding: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    *,
    chunk: int = 128,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Log-probability of each target and entropy of each prediction.

    Positions are taken in chunks whose logits are recomputed in the backward pass, so that memory
    holds `b * chunk * v` logits and never `b * t * v`.

    Args:
        hidden: Final hidden states.
        embedding: Output embedding.
        targets: Token ids, below v.
        chunk: Positions a chunk.

    Returns:
        log p(target) and entropy in nats, float32.
    """
    batch, length, width = hidden.shape
    chunks = -(-length // chunk)
    pad = chunks * chunk - length
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)))

    @jax.checkpoint
    def one(
        piece: tuple[Float[Array, "b c d"], Int[Array, "b c"]],
    ) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
        states, wanted = piece
        rows = states.reshape(-1, width) @ embedding.T
        logits = rows.reshape(*wanted.shape, -1).astype(jnp.float32)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(logprobs, wanted[..., None], axis=-1)[..., 0]
        return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)

    pieces = (
        hidden.reshape(batch, chunks, chunk, width).swapaxes(0, 1),
        targets.reshape(batch, chunks, chunk).swapaxes(0, 1),
    )
    chosen, entropy = jax.lax.map(one, pieces)

    def join(value: Float[Array, "n b c"]) -> Float[Array, "b t"]:
        return value.swapaxes(0, 1).reshape(batch, chunks * chunk)[:, :length]

    return join(chosen), join(entropy)
