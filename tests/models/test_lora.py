"""Adapters change nothing at first, have the gradient of what they stand for, and merge away."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from klong_jax.core.errors import UserError
from klong_jax.models.config import DecoderConfig, DTypes, LoraConfig, MoeConfig
from klong_jax.models.decoder import Params, build
from klong_jax.models.lora import ADAPTERS, abstract_adapted, adapt, merge_adapters
from klong_jax.parallel.rules import param_specs
from klong_jax.sft.loss import sft_loss
from klong_jax.training.accumulate import Trainer, init_state
from klong_jax.training.batches import WindowBatch
from klong_jax.training.frozen import Selection
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer

# Dense layers, shared and routed experts: whatever can and cannot be adapted.
MIXTURE = MoeConfig(4, 2, 16, "sigmoid", shared_size=16, dense_layers=1, router_bias=True)
MODEL = DecoderConfig(50, 16, 2, 4, 2, 8, 32, tie_embeddings=False, moe=MIXTURE)
DENSE = DecoderConfig(50, 16, 2, 4, 2, 8, 32)
ALL = LoraConfig(3, 6.0, ("query", "key", "value", "output", "gate", "up", "down"))
LEARNT = Selection(learnt=ADAPTERS)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 24))


def drawn(params: Params) -> Params:
    """The same with random adapters: fresh ones give nothing."""
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            0.3 * jax.random.normal(next(keys), leaf.shape, leaf.dtype)
            if "lora_b" in jax.tree_util.keystr(path)
            else leaf
        ),
        params,
    )


def hidden(graph: Any, params: Params) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: nnx.merge(graph, p).apply(TOKENS, remat="none"))(params))


def test_fresh_adapters_change_no_bit_and_merged_ones_nothing() -> None:
    with jax.enable_x64(True):
        dtypes = DTypes("float64", "float64")
        graph, params = build(MODEL, 0, dtypes)
        adapted, fresh = adapt(graph, params, ALL, dtypes, 0)
        plain = hidden(graph, params)
        np.testing.assert_array_equal(hidden(adapted, fresh), plain)
        moved = drawn(fresh)
        found = hidden(adapted, moved)
        assert np.abs(found - plain).max() > 0.1
        merged = merge_adapters(moved, ALL)
        assert jax.tree.structure(merged) == jax.tree.structure(params)
        np.testing.assert_allclose(hidden(graph, merged), found, rtol=1e-12, atol=1e-12)
        unmoved = merge_adapters(fresh, ALL)
        for one, two in zip(jax.tree.leaves(unmoved), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(one, two)
        shapes = abstract_adapted(MODEL, ALL, dtypes)
        assert shapes[0] == adapted
        assert jax.tree.structure(shapes[1]) == jax.tree.structure(fresh)


def test_a_seed_gives_its_adapters_and_another_seed_others() -> None:
    graph, params = build(DENSE, 0)
    a, b, c = (
        adapt(graph, params, ALL, DTypes(), seed)[1]["blocks"]["up"]["lora"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(a["lora_a"][...], b["lora_a"][...])
    assert (a["lora_a"][...] != c["lora_a"][...]).all()
    # As in PEFT: uniform up to the root of 1 / inputs.
    assert 0.9 / 4 < np.abs(a["lora_a"][...]).max() <= 1 / 4
    assert not a["lora_b"][...].any()


def batch(rows: int = 2) -> WindowBatch:
    trained = np.ones((rows, 24), np.float32)
    trained[:, :9] = 0
    zero = np.zeros_like(trained)
    tokens = TOKENS[:rows].astype(np.int32)
    return WindowBatch(tokens, trained, zero, zero, np.ones(rows, np.float32))


def chain_rule(graph: Any, moved: Params) -> dict[tuple[Any, ...], np.ndarray]:
    """Gradients of A and B from that of W + (alpha / rank) A B, which knows of no adapters."""
    loss = sft_loss(graph, remat="none")
    full = jax.jit(jax.grad(lambda p: loss(p, batch())[0]))(merge_adapters(moved, ALL))
    flat = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(moved)}
    grads = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(full)}
    expected = {}
    for path in [path for path in flat if path[-1] == "lora_a"]:
        stem = path[:-2]
        low, high = flat[path], flat[*stem, "lora", "lora_b"]
        grad = ALL.alpha / ALL.rank * grads[*stem, "kernel"]
        expected[path] = grad @ high.swapaxes(1, 2)
        expected[*stem, "lora", "lora_b"] = low.swapaxes(1, 2) @ grad
    return expected


def test_the_gradient_is_that_of_the_chain_rule() -> None:
    with jax.enable_x64(True):
        dtypes = DTypes("float64", "float64")
        graph, params = build(MODEL, 0, dtypes)
        adapted, fresh = adapt(graph, params, ALL, dtypes, 0)
        moved = drawn(fresh)
        expected = chain_rule(graph, moved)
        trainer = Trainer(sft_loss(adapted, remat="dots"), optax.identity(), selection=LEARNT)
        grads, _ = trainer.add(moved, None, batch())
        found = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(grads)}
        assert found.keys() == expected.keys()
        for path, value in expected.items():
            assert np.abs(found[path] - value).max() < 1e-12 * np.abs(value).max(), path


def test_training_moves_adapters_in_float32_beside_a_base_in_16_bits() -> None:
    dtypes = DTypes("bfloat16", "bfloat16")
    graph, params = build(DENSE, 0, dtypes)
    # As wide as those of a trained model: hidden states times fresh ones are near zero.
    params["embedding"] = params["embedding"].replace(25 * params["embedding"][...])
    lora = LoraConfig(8, 16.0, ("value", "down"))
    adapted, fresh = adapt(graph, params, lora, dtypes, 0)
    optimizer = make_optimizer(OptimizerConfig("adamw", 1e-2, weight_decay=0.0))
    trainer = Trainer(sft_loss(adapted, remat="none"), optimizer, 0, LEARNT)
    before = jax.tree.map(np.asarray, params)
    state = init_state(fresh, optimizer, LEARNT)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    losses = []
    for _ in range(25):
        state, logs = trainer.step(state, [batch()], 30)
        losses.append(logs["loss"])
    assert losses[-1] < 0.8 * losses[0]
    served = merge_adapters(state.params, lora)
    changed = set()
    for (path, now), then in zip(nnx.to_flat_state(served), jax.tree.leaves(before), strict=True):
        assert now.dtype == jnp.bfloat16
        if (np.asarray(now[...]) != then).any():
            changed.add(path)
    assert changed == {("blocks", "down", "kernel"), ("blocks", "value", "kernel")}
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(one, two)


def test_factors_lie_as_the_matrix_beside_them() -> None:
    mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))
    _, shapes = abstract_adapted(MODEL, ALL, DTypes())
    specs = dict(nnx.to_flat_state(param_specs(shapes, mesh)))
    factors = [path for path in specs if path[-1] == "lora_a"]
    assert len(factors) == 14
    for path in factors:
        layers, inputs, outputs = specs[*path[:-2], "kernel"]
        assert specs[path] == jax.sharding.PartitionSpec(layers, inputs, None)
        assert specs[*path[:-1], "lora_b"] == jax.sharding.PartitionSpec(layers, None, outputs)


def test_a_matrix_that_is_not_there_is_named() -> None:
    mixture = MoeConfig(4, 2, 16)
    graph, params = build(DecoderConfig(50, 16, 2, 2, 1, 8, 32, moe=mixture), 0)
    with pytest.raises(UserError, match=r"^lora.targets=gate: .*; leave it out\.$"):
        adapt(graph, params, LoraConfig(4, 8.0, ("query", "gate")), DTypes(), 0)
