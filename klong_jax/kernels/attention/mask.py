"""What a query sees: the pinned prefix, and its own window up to itself.

Short windows may stand one behind another in a row, where they are called its segments; a query
then sees its own segment.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SAVED = "attended"
"""Name of what attention keeps for its backward pass, to policies of rematerialisation."""


def segment_starts(segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Where in its row each token's segment begins."""
    positions = jnp.arange(segments.shape[1])
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["prefix_lengths", "lengths", "positions", "segments"],
    meta_fields=["prefix", "causal"],
)
@dataclass(frozen=True)
class WindowMask:
    """Keys are a prefix and then the window; queries are the window.

    Attributes:
        prefix: Keys before the window.
        causal: A query sees the window up to itself, not all of it.
        prefix_lengths: How many keys of the prefix a row has; all if None.
        lengths: How many tokens of the window a row has; all if None. A query past them sees
            nothing and its output is zero.
        positions: Where each query stands in the window; 0, 1, 2, ... if None.
        segments: Which segment each token of the window belongs to: 1 from the first token on, then
            2, and so on, and 0 behind the last, where a query sees nothing; one segment if None. A
            window of segments has no prefix and no lengths.
    """

    prefix: int
    causal: bool
    prefix_lengths: Int[Array, "b"] | None = None
    lengths: Int[Array, "b"] | None = None
    positions: Int[Array, "t"] | None = None
    segments: Int[Array, "b t"] | None = None

    def query_positions(self, queries: int) -> Int[Array, "t"]:
        """Where each query stands in the window."""
        return jnp.arange(queries) if self.positions is None else self.positions

    def visible(self, queries: Int[Array, "t"], keys: Int[Array, "s"]) -> Bool[Array, "r t s"]:
        """True where a query sees a key; one row if all rows are alike.

        Args:
            queries: Positions in the window.
            keys: Positions in prefix and window together.
        """
        in_prefix = keys < self.prefix
        seen = jnp.ones((1, queries.shape[0], keys.shape[0]), bool)
        if self.causal:
            seen &= keys - self.prefix <= queries[:, None]
        if self.prefix_lengths is not None:
            seen &= (~in_prefix | (keys < self.prefix_lengths[:, None]))[:, None]
        if self.lengths is not None:
            lengths = self.lengths[:, None]
            seen &= (in_prefix | (keys - self.prefix < lengths))[:, None]
            seen &= (queries < lengths)[:, :, None]
        if self.segments is not None:
            own = self.segments[:, queries, None]
            seen &= (own == self.segments[:, None, keys]) & (own > 0)
        return seen

    def zero_padding(self, out: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
        """Zeros, and no gradient, where a query is padding."""
        positions = self.query_positions(out.shape[1])
        if self.segments is not None:
            real = self.segments[:, positions] > 0
        elif self.lengths is not None:
            real = positions < self.lengths[:, None]
        else:
            return out
        return jnp.where(real[:, :, None, None], out, 0)
