"""What a query sees: the pinned prefix, and its own window up to itself."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SAVED = "attended"
"""Name of what attention keeps for its backward pass, to policies of rematerialisation."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["prefix_lengths", "lengths", "positions"],
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
    """

    prefix: int
    causal: bool
    prefix_lengths: Int[Array, "b"] | None = None
    lengths: Int[Array, "b"] | None = None
    positions: Int[Array, "t"] | None = None

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
        return seen

    def zero_padding(self, out: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
        """Zeros, and no gradient, where a query is past its row's tokens."""
        if self.lengths is None:
            return out
        real = self.query_positions(out.shape[1]) < self.lengths[:, None]
        return jnp.where(real[:, :, None, None], out, 0)
