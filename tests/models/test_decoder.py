"""The decoder against itself: cached, rematerialised, in other precisions, and as shapes only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from klong_jax.core.errors import UserError
from klong_jax.models.config import DecoderConfig, DTypes, MoeConfig, Remat
from klong_jax.models.cost import kept_numbers
from klong_jax.models.decoder import abstract, build, empty_cache

# Both kinds of layer, whose caches stand behind one another.
CONFIG = DecoderConfig(
    97,
    48,
    3,
    6,
    2,
    10,
    80,
    tie_embeddings=False,
    attention_bias=True,
    rotary_fraction=0.6,
    moe=MoeConfig(16, 2, 24, "sigmoid", shared_size=24, dense_layers=1, router_bias=True),
)
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 17))
GRAPH, PARAMS = build(CONFIG, 1)


def test_a_cache_filled_in_ragged_pieces_gives_the_same_states() -> None:
    decoder = nnx.merge(GRAPH, PARAMS)
    whole = decoder.apply(jnp.asarray(TOKENS))
    cache = empty_cache(CONFIG, 2, 20)
    extend = jax.jit(lambda *args: nnx.merge(GRAPH, PARAMS).extend(*args))
    # Row 0 takes 5 tokens and row 1 takes 9; padding stands outside the cache.
    positions = np.stack([np.r_[0:5, [20] * 4], np.arange(9)])
    tokens = np.take_along_axis(TOKENS, np.minimum(positions, 16), axis=1)
    first, cache = extend(jnp.asarray(tokens), jnp.asarray(positions), cache)
    positions = np.stack([np.arange(5, 17), np.r_[9:17, [20] * 4]])
    tokens = np.take_along_axis(TOKENS, np.minimum(positions, 16), axis=1)
    second, _ = extend(jnp.asarray(tokens), jnp.asarray(positions), cache)
    np.testing.assert_allclose(np.r_[first[0, :5], second[0]], whole[0], atol=1e-5)
    np.testing.assert_allclose(np.r_[first[1], second[1, :8]], whole[1], atol=1e-5)


DENSE = DecoderConfig(97, 16, 3, 2, 1, 8, 64)
DENSE_GRAPH, DENSE_PARAMS = build(DENSE, 0)


def gradient(remat: Remat) -> tuple[int, list[np.ndarray]]:
    """Bytes of temporaries and the gradient of a loss."""

    def loss(params: object) -> jax.Array:
        hidden = nnx.merge(DENSE_GRAPH, params).apply(jnp.tile(TOKENS, (1, 7)), remat=remat)
        return jnp.sum(jnp.sin(hidden))

    compiled = jax.jit(jax.grad(loss)).lower(DENSE_PARAMS).compile()
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(compiled(DENSE_PARAMS))]
    return compiled.memory_analysis().temp_size_in_bytes, leaves


def test_policies_trade_memory_and_nothing_else() -> None:
    tokens = 7 * TOKENS.size
    memory, want = gradient("none")
    assert memory > 4 * tokens * kept_numbers(DENSE, "none")
    for policy in ("full", "attention", "dots"):
        less, got = gradient(policy)
        assert 4 * tokens * kept_numbers(DENSE, policy) < less < memory, policy
        for one, two in zip(got, want, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="remat='some' is no policy; choose one of none, full"):
        gradient("some")


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_compiled_one_by_one_are_the_loop(remat: Remat) -> None:
    tokens = jnp.asarray(TOKENS)

    def run(params: object, scan: bool) -> tuple[jax.Array, tuple[object, object]]:
        decoder = nnx.merge(GRAPH, params)
        read = decoder.forward(tokens[:, :5], keep=True, remat=remat, scan=scan)
        out = decoder.forward(tokens[:, 5:], past=read.cache, remat=remat, scan=scan)
        return jnp.sum(jnp.sin(out.hidden)), (out.loads, read.cache)

    gradient = jax.jit(jax.grad(run, has_aux=True), static_argnums=1)
    looped, single = (jax.tree.leaves(gradient(PARAMS, scan)) for scan in (True, False))
    for one, other in zip(looped, single, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_half_precision_computes_and_full_precision_learns() -> None:
    _, halved = abstract(CONFIG, DTypes("bfloat16", "bfloat16"))
    # Small steps of the routers' bias, and a checkpoint's value of it, would be lost.
    whole = {path[-2:] for path, leaf in nnx.to_flat_state(halved) if leaf.dtype == jnp.float32}
    assert whole == {("router", "bias")}
    graph, params = abstract(CONFIG, DTypes("float32", "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    decoder = nnx.merge(graph, PARAMS)
    hidden = decoder.apply(jnp.asarray(TOKENS), remat="none")
    assert hidden.dtype == decoder.output_embedding.dtype == jnp.bfloat16
    assert empty_cache(CONFIG, 1, 4, decoder.dtypes)[0].dtype == jnp.bfloat16
    exact = np.asarray(nnx.merge(GRAPH, PARAMS).apply(jnp.asarray(TOKENS), remat="none"))
    error = np.abs(np.asarray(hidden, np.float32) - exact)
    assert 1e-6 < error.mean() < 0.02 * np.abs(exact).mean()


def test_shapes_without_memory_are_those_of_what_is_built() -> None:
    graph, shapes = abstract(CONFIG)
    assert graph == GRAPH
    assert jax.tree.structure(shapes) == jax.tree.structure(PARAMS)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(PARAMS), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


def test_heads_that_do_not_group_and_odd_rotations_are_named() -> None:
    with pytest.raises(UserError, match="num_kv_heads=4"):
        DecoderConfig(97, 48, 3, 6, 4, 10, 80)
    with pytest.raises(UserError, match=r"rotary_fraction=0\.5"):
        DecoderConfig(97, 48, 3, 6, 2, 10, 80, rotary_fraction=0.5)
