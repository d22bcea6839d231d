"""Every device takes its tokens and its rows of the vocabulary; without a mesh the one takes all.

The embedding lies cut in its width too where parameters are stored spread; it is gathered once a
pass, and its gradient is summed once over the tokens of all devices and scattered back.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from klong_jax.kernels.linear_cross_entropy import tiled
from klong_jax.kernels.linear_cross_entropy.tiled import Backend, Tile, Tokens
from klong_jax.kernels.placement import Axes, axes_of, on_mesh
from klong_jax.parallel.rules import active_rules, named_spec

Choose = Callable[[Array, Array], Backend]
"""How to compute the logits of hidden states and rows of the embedding."""


@dataclass(frozen=True)
class Layout:
    """Which mesh axes cut what.

    Attributes:
        tokens: Rows and positions of the tokens.
        vocab: Rows of the embedding.
        width: Columns of the embedding; all of these cut tokens too.
    """

    tokens: PartitionSpec
    vocab: Axes
    width: Axes

    @property
    def hidden(self) -> PartitionSpec:
        """Of hidden states."""
        return PartitionSpec(*self.tokens, None)

    @property
    def embedding(self) -> PartitionSpec:
        """Of the embedding and its gradient."""
        return PartitionSpec(self.vocab or None, self.width or None)

    @property
    def token_axes(self) -> Axes:
        """All axes over which tokens are spread."""
        return tuple(axis for part in self.tokens for axis in axes_of(part))


def layout(tokens: tuple[int, ...], embedding: tuple[int, ...]) -> Layout:
    """The layout that the active mesh and its rules give to tokens [b t] and embedding [v d].

    Raises:
        UserError: The mesh does not divide a dimension.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), active_rules()
    if not on_mesh():
        return Layout(PartitionSpec(None, None), (), ())
    spec = named_spec(tokens, ("batch", "length"), mesh, rules, "the tokens")
    stored = named_spec(embedding, ("vocab", "stored_embed"), mesh, rules, "the output embedding")
    cut = Layout(spec, axes_of(stored[0]), ())
    return replace(cut, width=tuple(axis for axis in axes_of(stored[1]) if axis in cut.token_axes))


def forward(
    hidden: Float[Array, "b t d"],
    embedding: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    *,
    choose: Choose,
    tile: Tile,
) -> Tokens:
    """`tiled.forward` on every device."""
    where = layout(targets.shape, embedding.shape)

    def local(hidden: Array, embedding: Array, targets: Array) -> Any:
        flat = hidden.reshape(-1, hidden.shape[-1]), _gather(embedding, where), targets.reshape(-1)
        how = choose(*flat[:2])
        tokens = tiled.forward(*flat, backend=how, tile=tile, vocab_axes=where.vocab)
        return jax.tree.map(lambda part: part.reshape(targets.shape), tokens)

    specs = where.hidden, where.embedding, where.tokens
    tokens: Tokens = _mapped(local, specs, where.tokens)(hidden, embedding, targets)
    return tokens


def backward(
    hidden: Float[Array, "b t d"],
    embedding: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    tokens: Tokens,
    d_logprobs: Float[Array, "b t"],
    d_entropies: Float[Array, "b t"],
    *,
    choose: Choose,
    tile: Tile,
) -> tuple[Float[Array, "b t d"], Float[Array, "v d"]]:
    """`tiled.backward` on every device, and the sums over devices."""
    where = layout(targets.shape, embedding.shape)

    def local(hidden: Array, embedding: Array, *each: Any) -> tuple[Array, Array]:
        flat = jax.tree.map(lambda x: x.reshape(-1), each)
        states, whole = hidden.reshape(-1, hidden.shape[-1]), _gather(embedding, where)
        how = choose(states, whole)
        d_hidden, d_whole = tiled.backward(
            states, whole, *flat, backend=how, tile=tile, vocab_axes=where.vocab
        )
        if where.vocab:
            d_hidden = jax.lax.psum(d_hidden, where.vocab)
        return d_hidden.reshape(hidden.shape), _scatter(d_whole, where)

    # Targets, what is known of the tokens, and two cotangents: all lie as the tokens do.
    specs = where.hidden, where.embedding, *(where.tokens,) * 4
    run = _mapped(local, specs, (where.hidden, where.embedding))
    gradients: tuple[Array, Array] = run(
        hidden, embedding, targets, tokens, d_logprobs, d_entropies
    )
    return gradients


def _gather(embedding: Array, where: Layout) -> Array:
    if not where.width:
        return embedding
    whole: Array = jax.lax.all_gather(embedding, where.width, axis=1, tiled=True)
    return whole


def _scatter(d_embedding: Array, where: Layout) -> Array:
    over = tuple(axis for axis in where.token_axes if axis not in where.width)
    total: Array = jax.lax.psum(d_embedding, over) if over else d_embedding
    if where.width:
        total = jax.lax.psum_scatter(total, where.width, scatter_dimension=1, tiled=True)
    return total


def _mapped(local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    if not on_mesh():
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
