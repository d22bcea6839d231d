"""Cross-entropy from hidden states: the signatures, the gradient, the dispatch."""

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klong_jax.core.errors import UserError
from klong_jax.kernels.backend import chosen, in_16_bits, on_hopper, platform
from klong_jax.kernels.linear_cross_entropy import reference, sharded, xla
from klong_jax.kernels.linear_cross_entropy.tiled import Backend, Tile, Tokens

BACKENDS: Mapping[str, str] = {
    "reference": "all logits at once",
    "xla": "tile by tile",
    "hopper": "tile by tile, without logits in memory",
}

# What the kernels copy is in whole steps of the width, and store in whole tiles of the vocabulary.
_HOPPER_WIDTH, _HOPPER_VOCAB = 64, 128

# Logits of a quarter of a gigabyte on an accelerator, in 16 bits where the kernels keep them from
# memory, and on a CPU of what its cache holds.
_TILE, _TILE_HOPPER, _TILE_CPU = (8192, 8192), (16384, 8192), (1024, 1024)


class LinearCrossEntropy(NamedTuple):
    """What there is to know of the predictions, in nats.

    Attributes:
        weighted_sum: Sum over tokens of weight times cross-entropy.
        logprobs: Log-probability of each target.
        entropies: Entropy of each prediction.
    """

    weighted_sum: Float[Array, ""]
    logprobs: Float[Array, "..."]
    entropies: Float[Array, "..."]


def linear_cross_entropy(
    hidden: Float[Array, "... d"],
    embedding: Float[Array, "v d"],
    targets: Int[Array, "..."],
    weights: Float[Array, "..."],
    *,
    tile: Tile | None = None,
    backend: str | None = None,
) -> LinearCrossEntropy:
    """Weighted cross-entropy of targets under softmax(hidden @ embedding.T).

    Everything is differentiable in hidden states, embedding and weights.

    Args:
        hidden: Final hidden states.
        embedding: Output embedding.
        targets: Token ids, below v; any id where the weight is 0.
        weights: Of each token.
        tile: Tokens and rows of the vocabulary whose logits exist at a time on one device.
        backend: One of BACKENDS; chosen by platform and shape if None.
    """
    logprobs, entropies = token_logprobs(hidden, embedding, targets, tile=tile, backend=backend)
    return LinearCrossEntropy(-jnp.sum(weights * logprobs), logprobs, entropies)


def token_logprobs(
    hidden: Float[Array, "... d"],
    embedding: Float[Array, "v d"],
    targets: Int[Array, "..."],
    *,
    tile: Tile | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Log-probability of each target and entropy of each prediction, in nats.

    Under a mesh the first dimension of tokens is "batch", the second "length".

    Args:
        hidden: Final hidden states.
        embedding: Output embedding.
        targets: Token ids, below v.
        tile: Tokens and rows of the vocabulary whose logits exist at a time on one device.
        backend: One of BACKENDS; chosen by platform and shape if None.
    """
    asked = chosen("linear_cross_entropy", backend, BACKENDS)
    if asked == "reference":
        return reference.token_logprobs(hidden, embedding, targets)
    if tile is None:
        large = _TILE_HOPPER if on_hopper() else _TILE
        tile = _TILE_CPU if platform() == "cpu" else large
    width = embedding.shape[1]
    rows = (targets.shape[0], prod(targets.shape[1:])) if targets.ndim else (1, 1)
    out = _rows(hidden.reshape(*rows, width), embedding, targets.reshape(rows), asked, tile)
    return out[0].reshape(targets.shape), out[1].reshape(targets.shape)


def _choose(
    asked: str | None, hidden: Float[Array, "... d"], embedding: Float[Array, "v d"]
) -> Backend:
    """For the part of the tokens and of the vocabulary that one device has."""
    vocab, width = embedding.shape
    fits = vocab % _HOPPER_VOCAB == 0 and width % _HOPPER_WIDTH == 0
    fits &= in_16_bits(hidden.dtype, embedding.dtype)
    if asked == "hopper" and not fits:
        raise UserError(
            f"linear_cross_entropy: the backend hopper takes 16 bits, a vocabulary that "
            f"{_HOPPER_VOCAB} and a width that {_HOPPER_WIDTH} divides, not an embedding "
            f"{embedding.dtype}{list(embedding.shape)}."
        )
    if asked == "xla" or not (fits and (asked or on_hopper())):
        return xla.BACKEND
    # Here and not above: what the kernels are compiled with is not in every jaxlib.
    from klong_jax.kernels.linear_cross_entropy import hopper

    return hopper.BACKEND


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _rows(
    hidden: Float[Array, "b t d"],
    embedding: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    asked: str | None,
    tile: Tile,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    return _forward(hidden, embedding, targets, asked, tile)[0]


Residuals = tuple[Float[Array, "b t d"], Float[Array, "v d"], Int[Array, "b t"], Tokens]


def _forward(
    hidden: Float[Array, "b t d"],
    embedding: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    asked: str | None,
    tile: Tile,
) -> tuple[tuple[Float[Array, "b t"], Float[Array, "b t"]], Residuals]:
    tokens = sharded.forward(hidden, embedding, targets, choose=partial(_choose, asked), tile=tile)
    return (tokens.logprobs, tokens.entropies), (hidden, embedding, targets, tokens)


def _backward(
    asked: str | None,
    tile: Tile,
    residuals: Residuals,
    cotangents: tuple[Float[Array, "b t"], Float[Array, "b t"]],
) -> tuple[Float[Array, "b t d"], Float[Array, "v d"], None]:
    hidden, embedding, _, _ = residuals
    d_hidden, d_embedding = sharded.backward(
        *residuals, *cotangents, choose=partial(_choose, asked), tile=tile
    )
    return d_hidden.astype(hidden.dtype), d_embedding.astype(embedding.dtype), None


_rows.defvjp(_forward, _backward)
