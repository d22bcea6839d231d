"""One layer of the decoder: attention, then an MLP or a mixture of experts."""

from flax import nnx
from jaxtyping import Array, Float, Int

from klong_jax.models.config import DecoderConfig, DTypes
from klong_jax.models.experts import Counted
from klong_jax.models.layers import linear, norm, on_tokens, swiglu
from klong_jax.models.moe import Moe
from klong_jax.models.rotary import normed_and_rotated, rotate
from klong_jax.parallel.rules import constrain

Projected = tuple[Float[Array, "b t h d"], Float[Array, "b t k d"], Float[Array, "b t k d"]]
Load = Int[Array, " e"] | None
"""Counted tokens that each expert of a layer was given; None of a layer without experts."""


class Block(nnx.Module):
    """Attention and MLP of one layer, each on a normalised residual stream."""

    def __init__(
        self, config: DecoderConfig, dtypes: DTypes, *, dense: bool, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        width, head = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads * head, config.num_kv_heads * head
        bias, eps = config.attention_bias, config.norm_eps

        self.attention_norm = norm(width, eps, dtypes, rngs)
        self.mlp_norm = norm(width, eps, dtypes, rngs)
        self.query = linear(width, heads, dtypes, rngs, bias=bias)
        self.key = linear(width, kv_heads, dtypes, rngs, bias=bias)
        self.value = linear(width, kv_heads, dtypes, rngs, bias=bias)
        self.output = linear(heads, width, dtypes, rngs)
        if config.qk_norm:
            self.query_norm = norm(head, eps, dtypes, rngs)
            self.key_norm = norm(head, eps, dtypes, rngs)
        if dense or config.moe is None:
            size = config.intermediate_size
            self.gate, self.up = (linear(width, size, dtypes, rngs) for _ in range(2))
            self.down = linear(size, width, dtypes, rngs)
        else:
            self.moe = Moe(width, config.moe, dtypes, rngs=rngs)

    def project(self, hidden: Float[Array, "b t w"], positions: Int[Array, "b t"]) -> Projected:
        """Queries, keys and values of the normalised stream, rotated to their positions."""
        config = self.config
        normed = self.attention_norm(hidden)

        def heads(layer: nnx.Linear, count: int, name: str) -> Array:
            split = on_tokens(layer, normed).reshape(*hidden.shape[:2], count, config.head_dim)
            return constrain(split, "batch", "length", name, None)

        query = heads(self.query, config.num_heads, "heads")
        key = heads(self.key, config.num_kv_heads, "kv_heads")
        value = heads(self.value, config.num_kv_heads, "kv_heads")
        if config.qk_norm:
            query = normed_and_rotated(self.query_norm, query, positions, config)
            key = normed_and_rotated(self.key_norm, key, positions, config)
            return query, key, value
        return rotate(query, positions, config), rotate(key, positions, config), value

    def finish(
        self,
        hidden: Float[Array, "b t w"],
        attended: Float[Array, "b t h d"],
        counted: Counted = None,
    ) -> tuple[Float[Array, "b t w"], Load]:
        """Adds the attention's output and the MLP's to the stream; also gives the experts' load."""
        flat = attended.reshape(*hidden.shape[:2], -1)
        hidden = _stream(hidden + on_tokens(self.output, flat))
        normed = self.mlp_norm(hidden)
        if hasattr(self, "moe"):
            added, load = self.moe(normed, counted)
        else:
            added, load = swiglu(self, normed), None
        return _stream(hidden + added), load


def _stream(hidden: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
    return constrain(hidden, "batch", "length", "embed")
