"""A device's tokens against its part of the vocabulary, tile by tile, forward and backward.

Only the logits of one tile of tokens and vocabulary exist at a time, at most. The backward pass
computes them again from what the forward pass kept of each token, the log of the softmax's
denominator and the entropy. Tiles are about square: every tile adds to its tokens' and to its rows'
gradient, which is as much memory traffic as they are wide and high.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from klong_jax.kernels.placement import Axes

Tile = tuple[int, int]
"""At most so many tokens, and so many rows of the vocabulary."""

_ALIGNED = 128


class Tokens(NamedTuple):
    """What the forward pass knows of each token, in nats."""

    logprobs: Float[Array, "n"]
    entropies: Float[Array, "n"]
    log_totals: Float[Array, "n"]


class Softmax(NamedTuple):
    """What is known of each token after some of the vocabulary.

    Attributes:
        top: The greatest logit.
        total: Sum of exp(logit - top).
        moment: Sum of exp(logit - top) * logit.
        target: The target's logit, 0 if it was not among them.
    """

    top: Float[Array, "n"]
    total: Float[Array, "n"]
    moment: Float[Array, "n"]
    target: Float[Array, "n"]


class Known(NamedTuple):
    """What the backward pass is told of each token.

    Attributes:
        target: Index of its target among the rows, if it is there.
        log_total: Log of its softmax's denominator.
        entropy: Of its prediction.
        d_logprob: Gradient of its target's log-probability.
        d_entropy: Gradient of its entropy.
    """

    target: Int[Array, "n"]
    log_total: Float[Array, "n"]
    entropy: Float[Array, "n"]
    d_logprob: Float[Array, "n"]
    d_entropy: Float[Array, "n"]


@dataclass(frozen=True)
class Backend:
    """How logits are computed.

    Attributes:
        softmax: Takes hidden states, rows of the embedding, the targets' indices among these and
            the size of a tile.
        d_logits: Gradient of the logits of hidden states and rows, in their dtype.
    """

    softmax: Callable[[Array, Array, Array, Tile], Softmax]
    d_logits: Callable[[Array, Array, Known], Array]


def forward(
    hidden: Float[Array, "n d"],
    embedding: Float[Array, "v d"],
    targets: Int[Array, "n"],
    *,
    backend: Backend,
    tile: Tile,
    vocab_axes: Axes = (),
) -> Tokens:
    """Log-probability of each target and entropy of each prediction.

    Args:
        hidden: Hidden states.
        embedding: Output embedding; of a vocabulary that is cut, this device's rows.
        targets: Token ids of the whole vocabulary.
        backend: How logits are computed.
        tile: Sizes of a tile.
        vocab_axes: Mesh axes that cut the vocabulary, all of them mapped.
    """
    local = backend.softmax(hidden, embedding, targets - _offset(embedding, vocab_axes), tile)
    if not vocab_axes:
        return _tokens(local)
    top = jax.lax.pmax(local.top, vocab_axes)
    shrunk = jnp.exp(local.top - top)
    sums = local.total * shrunk, local.moment * shrunk, local.target
    return _tokens(Softmax(top, *jax.lax.psum(sums, vocab_axes)))


def backward(
    hidden: Float[Array, "n d"],
    embedding: Float[Array, "v d"],
    targets: Int[Array, "n"],
    tokens: Tokens,
    d_logprobs: Float[Array, "n"],
    d_entropies: Float[Array, "n"],
    *,
    backend: Backend,
    tile: Tile,
    vocab_axes: Axes = (),
) -> tuple[Float[Array, "n d"], Float[Array, "v d"]]:
    """Gradients of hidden states and embedding: this device's terms of the sums over devices."""
    accurate = tokens.logprobs.dtype
    targets = targets - _offset(embedding, vocab_axes)
    each = Known(targets, tokens.log_totals, tokens.entropies, d_logprobs, d_entropies)
    states = cut(hidden, tile)
    known = jax.tree.map(lambda x: cut(x, tile), each)

    def column(
        gradients: tuple[Float[Array, "m t d"], Float[Array, "v d"]], start: Int[Array, ""]
    ) -> tuple[tuple[Float[Array, "m t d"], Float[Array, "v d"]], None]:
        rows = Rows.at(embedding, start, tile)
        own = jnp.where(rows.fresh[:, None], rows.values, 0)

        def step(
            sums: tuple[Float[Array, "m t d"], Float[Array, "r d"]],
            piece: tuple[Int[Array, ""], Float[Array, "t d"], Known],
        ) -> tuple[tuple[Float[Array, "m t d"], Float[Array, "r d"]], None]:
            index, states, known = piece
            known = known._replace(target=known.target - rows.first)
            d_logits = backend.d_logits(states, rows.values, known)
            d_states = jnp.dot(d_logits, own, preferred_element_type=accurate)
            d_rows = jnp.dot(d_logits.T, states, preferred_element_type=accurate)
            return (sums[0].at[index].add(d_states), sums[1] + d_rows), None

        d_hidden, d_embedding = gradients
        zeros = jnp.zeros(rows.values.shape, accurate)
        numbered = jnp.arange(states.shape[0]), states, known
        (d_hidden, d_rows), _ = jax.lax.scan(step, (d_hidden, zeros), numbered)
        d_rows = jnp.where(rows.fresh[:, None], d_rows, 0)
        before = jax.lax.dynamic_slice_in_dim(d_embedding, rows.first, d_rows.shape[0])
        d_rows = before + d_rows.astype(embedding.dtype)
        d_embedding = jax.lax.dynamic_update_slice_in_dim(d_embedding, d_rows, rows.first, axis=0)
        return (d_hidden, d_embedding), None

    zeros = jnp.zeros(states.shape, accurate), jnp.zeros_like(embedding)
    (d_hidden, d_embedding), _ = jax.lax.scan(column, zeros, starts(embedding, tile))
    return d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], d_embedding


class Rows(NamedTuple):
    """Rows of the embedding: those of a tile, the last of which begins early to be as large.

    Attributes:
        first: Index of the first.
        values: The rows.
        fresh: False of rows that an earlier tile had.
    """

    first: Int[Array, ""]
    values: Float[Array, "r d"]
    fresh: Bool[Array, "r"]

    @classmethod
    def at(cls, embedding: Float[Array, "v d"], start: Int[Array, ""], tile: Tile) -> "Rows":
        """Those from `start` on."""
        size = _height(embedding, tile)
        first = jnp.minimum(start, embedding.shape[0] - size)
        values = jax.lax.dynamic_slice_in_dim(embedding, first, size)
        return cls(first, values, first + jnp.arange(size) >= start)


def starts(embedding: Float[Array, "v d"], tile: Tile) -> Int[Array, "c"]:
    """Where even tiles of rows begin."""
    return jnp.arange(0, embedding.shape[0], _height(embedding, tile))


def cut(x: Array, tile: Tile) -> Array:
    """Even blocks of tokens along a new leading axis, the last one padded with zeros."""
    count, size = _even(x.shape[0], tile[0])
    padded = jnp.pad(x, ((0, count * size - x.shape[0]), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(count, size, *x.shape[1:])


def _height(embedding: Float[Array, "v d"], tile: Tile) -> int:
    return min(embedding.shape[0], _even(embedding.shape[0], tile[1])[1])


def _even(length: int, most: int) -> tuple[int, int]:
    """How many parts of at most a size, and how long they are."""
    count = max(1, -(-length // most))
    size = -(-length // count)
    if count > 1 and size > _ALIGNED:
        size = -(-size // _ALIGNED) * _ALIGNED
    return count, size


def _offset(embedding: Float[Array, "v d"], vocab_axes: Axes) -> Int[Array, ""] | int:
    return jax.lax.axis_index(vocab_axes) * embedding.shape[0] if vocab_axes else 0


def _tokens(known: Softmax) -> Tokens:
    log_total = known.top + jnp.log(known.total)
    return Tokens(known.target - log_total, log_total - known.moment / known.total, log_total)
