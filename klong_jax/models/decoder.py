"""The decoder: one set of blocks for training, prefill and decoding.

Blocks of a kind are stacked along a leading layer axis and scanned, so that compile time does not
grow with depth: leading dense layers are one stack, those with experts another. `apply` runs over
whole windows; `extend` appends tokens to a key-value cache whose rows are at different lengths.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from klong_jax.kernels.attention import attention, cached_attention, segment_starts
from klong_jax.models.block import Block, Load
from klong_jax.models.config import DecoderConfig, DTypes, Remat
from klong_jax.models.experts import Counted
from klong_jax.models.layers import INIT, norm, stacked
from klong_jax.models.remat import rematerialised
from klong_jax.parallel.rules import constrain

Params = Any
Cache = tuple[Float[Array, "l b s k d"], Float[Array, "l b s k d"]]
Loads = Int[Array, "l e"] | None
"""Counted tokens of each expert in each layer that has experts; None without experts."""

FLOAT32 = DTypes()


class Forward(NamedTuple):
    """What a pass over tokens gives.

    Attributes:
        hidden: Final hidden states.
        loads: How many counted tokens each expert of each layer was given; None without experts.
        cache: Keys and values of each layer and token, if they were asked for.
    """

    hidden: Float[Array, "b t w"]
    loads: Loads
    cache: Cache | None


class Decoder(nnx.Module):
    """Embedding, stacked blocks, final norm and output embedding."""

    def __init__(self, config: DecoderConfig, dtypes: DTypes = FLOAT32, *, rngs: nnx.Rngs) -> None:
        self.config, self.dtypes = config, dtypes
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(INIT(rngs.params(), shape, dtypes.params))
        if not config.tie_embeddings:
            self.unembedding = nnx.Param(INIT(rngs.params(), shape, dtypes.params))

        def blocks(dense: bool) -> Callable[[nnx.Rngs], Block]:
            return lambda rngs: Block(config, dtypes, dense=dense, rngs=rngs)

        if config.moe is None:
            self.blocks = stacked(blocks(True), config.num_layers, rngs)
        else:
            leading = config.moe.dense_layers
            if leading:
                self.dense_blocks = stacked(blocks(True), leading, rngs)
            self.blocks = stacked(blocks(False), config.num_layers - leading, rngs)
        self.norm = norm(config.hidden_size, config.norm_eps, dtypes, rngs)

    @property
    def output_embedding(self) -> Float[Array, "v w"]:
        """What hidden states are compared with to give logits, in the compute dtype."""
        chosen = self.embedding if self.config.tie_embeddings else self.unembedding
        return chosen[...].astype(self.dtypes.compute)

    def apply(self, tokens: Int[Array, "b t"], *, remat: Remat = "full") -> Float[Array, "b t w"]:
        """Final hidden states of whole windows, causal, positions from 0.

        Padding at the end needs no mask: nothing before it looks at it.

        Args:
            tokens: Token ids.
            remat: What each layer keeps for the backward pass.
        """
        return self.forward(tokens, remat=remat).hidden

    def forward(
        self,
        tokens: Int[Array, "b t"],
        *,
        past: Cache | None = None,
        keep: bool = False,
        remat: Remat = "full",
        scan: bool = True,
        counted: Counted = None,
        segments: Int[Array, "b t"] | None = None,
    ) -> Forward:
        """Runs over whole windows, or over what follows a prefix that was run before.

        Args:
            tokens: Token ids.
            past: Keys and values of the p tokens before them, as `keep` gave them; positions then
                count from p. Differentiable.
            keep: Whether to give keys and values.
            remat: What each layer keeps for the backward pass.
            scan: Whether layers are one compiled loop, or each is compiled.
            counted: Which tokens the experts' load counts; all if None.
            segments: Which of the windows that share a row each token belongs to, as attention
                takes them: each sees itself alone, and its positions count from 0. One window a row
                if None.
        """
        start = 0 if past is None else past[0].shape[2]
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        if segments is not None:
            positions -= segment_starts(segments)
        hidden, loads, kept = self._embed(tokens), None, []
        for graph, layers, numbers in self._stacks():

            def layer(
                hidden: Float[Array, "b t w"],
                given: tuple[Params, tuple[Array, Array] | None],
                graph: Any = graph,
            ) -> tuple[Array, tuple[Load, tuple[Array, Array] | None]]:
                state, before = given
                block = nnx.merge(graph, state)
                query, *own = block.project(hidden, positions)
                seen = own if before is None else map(_after, before, own)
                attended = attention(query, *seen, segments=segments)
                hidden, load = block.finish(hidden, attended, counted)
                return hidden, (load, (own[0], own[1]) if keep else None)

            before = None if past is None else _layers(past, numbers)
            over = jax.lax.scan if scan else _one_by_one
            hidden, (loads, own) = over(
                rematerialised(layer, remat, scanned=scan), hidden, (layers, before)
            )
            kept.append(own)
        cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept) if keep else None
        return Forward(self.norm(hidden), loads, cache)

    def extend(
        self, tokens: Int[Array, "b t"], positions: Int[Array, "b t"], cache: Cache
    ) -> tuple[Float[Array, "b t w"], Cache]:
        """Final hidden states of tokens appended to a cache.

        Args:
            tokens: Token ids.
            positions: Where each stands in its row; one outside the cache is dropped, which is
                how rows with fewer tokens are padded.
            cache: Keys and values of each layer, row and position.

        Returns:
            Hidden states (meaningless at dropped positions) and the extended cache.
        """
        rows = jnp.arange(tokens.shape[0])[:, None]
        carry = self._embed(tokens), cache
        for graph, layers, numbers in self._stacks():

            def layer(
                carry: tuple[Array, Cache], numbered: tuple[Array, Params], graph: Any = graph
            ) -> tuple[tuple[Array, Cache], None]:
                hidden, (keys, values) = carry
                index, state = numbered
                block = nnx.merge(graph, state)
                query, key, value = block.project(hidden, positions)
                keys = keys.at[index, rows, positions].set(key, mode="drop")
                values = values.at[index, rows, positions].set(value, mode="drop")
                attended = cached_attention(query, keys[index], values[index], positions)
                return (block.finish(hidden, attended)[0], (keys, values)), None

            carry, _ = jax.lax.scan(layer, carry, (jnp.asarray(numbers), layers))
        hidden, cache = carry
        return self.norm(hidden), cache

    def _embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t w"]:
        # Whole rows are looked up: XLA would replicate what is taken from a width that is cut.
        table = constrain(self.embedding[...].astype(self.dtypes.compute), "vocab", "embed")
        return constrain(table[tokens], "batch", "length", "embed")

    def _stacks(self) -> Iterator[tuple[Any, Params, range]]:
        """Graph, parameters and layer numbers of each stack of blocks."""
        if hasattr(self, "dense_blocks"):
            yield *nnx.split(self.dense_blocks), range(self.config.dense_layers)
        first = self.config.dense_layers if self.config.moe else 0
        yield *nnx.split(self.blocks), range(first, self.config.num_layers)


def _one_by_one(layer: Callable[..., Any], hidden: Array, given: Any) -> tuple[Array, Any]:
    """What a scan gives, without a loop: nothing is copied into and out of stacked arrays."""
    leaves, tree = jax.tree.flatten(given)
    # The gradient of a split is one concatenation, that of slices a sum of as many whole arrays.
    split = [jax.lax.split(leaf, (1,) * len(leaf)) for leaf in leaves]
    outs = []
    for one in zip(*split, strict=True):
        hidden, out = layer(hidden, jax.tree.unflatten(tree, [leaf[0] for leaf in one]))
        outs.append(out)
    return hidden, jax.tree.map(lambda *each: jnp.stack(each), *outs)


def _layers(cache: Cache, numbers: range) -> Cache:
    """The part of a cache that belongs to a stack of layers."""
    keys, values = (x[numbers.start : numbers.stop] for x in cache)
    return keys, values


def _after(before: Float[Array, "b p k d"], own: Float[Array, "b t k d"]) -> Array:
    """Keys or values of a prefix and then of the window."""
    together = jnp.concatenate([before, own], axis=1)
    return constrain(together, "batch", "length", "kv_heads", None)


def empty_cache(config: DecoderConfig, rows: int, length: int, dtypes: DTypes = FLOAT32) -> Cache:
    """A cache of zeros for `rows` sequences of up to `length` tokens."""
    shape = (config.num_layers, rows, length, config.num_kv_heads, config.head_dim)
    return jnp.zeros(shape, dtypes.compute), jnp.zeros(shape, dtypes.compute)


def build(
    config: DecoderConfig, seed: int, dtypes: DTypes = FLOAT32
) -> tuple[nnx.GraphDef[Decoder], Params]:
    """A randomly initialised decoder, split into its graph and its parameters."""
    graph, params = nnx.split(Decoder(config, dtypes, rngs=nnx.Rngs(params=seed)))
    return graph, params


def abstract(
    config: DecoderConfig, dtypes: DTypes = FLOAT32
) -> tuple[nnx.GraphDef[Decoder], Params]:
    """The graph, and the parameters' shapes and dtypes in their place: takes no memory."""
    shapes = nnx.eval_shape(lambda: Decoder(config, dtypes, rngs=nnx.Rngs(params=0)))
    graph, params = nnx.split(shapes)
    return graph, params
