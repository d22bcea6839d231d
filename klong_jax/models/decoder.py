"""The decoder: one set of blocks for training, prefill and decoding.

Blocks are stacked along a leading layer axis and scanned, so that compile time does not grow with
depth. `apply` runs over whole windows; `extend` appends tokens to a key-value cache whose rows are
at different lengths.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from klong_jax.kernels.attention import causal_attention, masked_attention
from klong_jax.models.config import DecoderConfig

Params = Any
Cache = tuple[Float[Array, "l b s k d"], Float[Array, "l b s k d"]]

_INIT_STD = 0.02


class Block(nnx.Module):
    """Attention and MLP of one layer, each on a normalised residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, heads = config.hidden_size, config.num_heads * config.head_dim
        kv_heads = config.num_kv_heads * config.head_dim

        def linear(n_in: int, n_out: int) -> nnx.Linear:
            init = nnx.initializers.normal(_INIT_STD)
            return nnx.Linear(n_in, n_out, use_bias=False, kernel_init=init, rngs=rngs)

        def norm(size: int) -> nnx.RMSNorm:
            return nnx.RMSNorm(size, epsilon=config.norm_eps, rngs=rngs)

        self.attention_norm, self.mlp_norm = norm(width), norm(width)
        self.query, self.key = linear(width, heads), linear(width, kv_heads)
        self.value, self.output = linear(width, kv_heads), linear(heads, width)
        if config.qk_norm:
            self.query_norm, self.key_norm = norm(config.head_dim), norm(config.head_dim)
        self.gate, self.up = (
            linear(width, config.intermediate_size),
            linear(width, config.intermediate_size),
        )
        self.down = linear(config.intermediate_size, width)

    def project(
        self, hidden: Float[Array, "b t w"], positions: Int[Array, "b t"]
    ) -> tuple[
        Float[Array, "b t h d"],
        Float[Array, "b t k d"],
        Float[Array, "b t k d"],
    ]:
        """Queries, keys and values of the normalised stream, rotated to their positions."""
        config = self.config
        batch, length, _ = hidden.shape
        # Matrices of tokens, not batches of them: XLA's CPU backend is three times faster so.
        normed = self.attention_norm(hidden).reshape(batch * length, -1)
        query = self.query(normed).reshape(batch, length, config.num_heads, config.head_dim)
        key = self.key(normed).reshape(batch, length, config.num_kv_heads, config.head_dim)
        value = self.value(normed).reshape(batch, length, config.num_kv_heads, config.head_dim)
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, positions, config), rotate(key, positions, config), value

    def finish(
        self, hidden: Float[Array, "b t w"], attended: Float[Array, "b t h d"]
    ) -> Float[Array, "b t w"]:
        """Adds the attention's output and the MLP's to the stream."""
        shape = hidden.shape
        tokens = hidden.reshape(-1, shape[-1])
        tokens = tokens + self.output(attended.reshape(tokens.shape[0], -1))
        normed = self.mlp_norm(tokens)
        return (tokens + self.down(jax.nn.silu(self.gate(normed)) * self.up(normed))).reshape(shape)


class Decoder(nnx.Module):
    """Embedding, stacked blocks, final norm and output embedding."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        init = nnx.initializers.normal(_INIT_STD)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(init(rngs.params(), shape))
        if not config.tie_embeddings:
            self.unembedding = nnx.Param(init(rngs.params(), shape))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = stack(rngs)
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, rngs=rngs)

    @property
    def output_embedding(self) -> Float[Array, "v w"]:
        """What hidden states are compared with to give logits."""
        chosen = self.embedding if self.config.tie_embeddings else self.unembedding
        return chosen[...]

    def apply(self, tokens: Int[Array, "b t"], *, remat: bool = True) -> Float[Array, "b t w"]:
        """Final hidden states of whole windows, causal, positions from 0.

        Padding at the end needs no mask: nothing before it looks at it.

        Args:
            tokens: Token ids.
            remat: Recompute each layer's activations in the backward pass.
        """
        length = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        graph, layers = nnx.split(self.blocks)

        def layer(hidden: Float[Array, "b t w"], state: Params) -> tuple[Array, None]:
            block = nnx.merge(graph, state)
            query, key, value = block.project(hidden, positions)
            return block.finish(hidden, causal_attention(query, key, value)), None

        step = jax.checkpoint(layer) if remat else layer
        hidden, _ = jax.lax.scan(step, self.embedding[...][tokens], layers)
        return self.norm(hidden)

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
        mask = jnp.arange(cache[0].shape[2])[None, None, :] <= positions[:, :, None]
        graph, layers = nnx.split(self.blocks)

        def layer(
            carry: tuple[Array, Cache], numbered: tuple[Array, Params]
        ) -> tuple[tuple[Array, Cache], None]:
            hidden, (keys, values) = carry
            index, state = numbered
            block = nnx.merge(graph, state)
            query, key, value = block.project(hidden, positions)
            keys = keys.at[index, rows, positions].set(key, mode="drop")
            values = values.at[index, rows, positions].set(value, mode="drop")
            attended = masked_attention(query, keys[index], values[index], mask)
            return (block.finish(hidden, attended), (keys, values)), None

        numbered = (jnp.arange(self.config.num_layers), layers)
        (hidden, cache), _ = jax.lax.scan(layer, (self.embedding[...][tokens], cache), numbered)
        return self.norm(hidden), cache


def empty_cache(config: DecoderConfig, rows: int, length: int) -> Cache:
    """A cache of zeros for `rows` sequences of up to `length` tokens."""
    shape = (config.num_layers, rows, length, config.num_kv_heads, config.head_dim)
    return jnp.zeros(shape), jnp.zeros(shape)


def rotate(
    x: Float[Array, "b t n d"], positions: Int[Array, "b t"], config: DecoderConfig
) -> Float[Array, "b t n d"]:
    """Rotary embedding, the two halves of a head rotated against each other (Su et al. 2021)."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def build(config: DecoderConfig, seed: int) -> tuple[nnx.GraphDef[Decoder], Params]:
    """A randomly initialised decoder, split into its graph and its parameters."""
    graph, params = nnx.split(Decoder(config, rngs=nnx.Rngs(params=seed)))
    return graph, params
