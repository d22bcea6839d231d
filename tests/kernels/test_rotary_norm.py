"""Norm and rotation in one kernel give what they give apart; the kernel runs interpreted here."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from kernel_helpers import assert_close, value_and_gradients

from klong_jax.kernels.backend import use_kernels
from klong_jax.kernels.rotary_norm import rotary_norm, triton
from klong_jax.models.config import DecoderConfig
from klong_jax.models.decoder import build

# Rows that are no whole tiles.
SHAPE = (2, 21, 3, 32)


def run(heads: Any, scale: Any, backend: str) -> Any:
    angles = np.random.default_rng(0).uniform(0, 1e3, (*SHAPE[:2], SHAPE[-1] // 2))
    turns = jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))
    return rotary_norm(heads, scale, *turns, epsilon=1e-6, backend=backend)


def test_the_kernel_gives_the_formula_and_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def interpreted(*arguments: Any, compiler_params: Any, **options: Any) -> Any:
        return call(*arguments, interpret=True, **options)

    call = triton.pl.pallas_call
    monkeypatch.setattr(triton.pl, "pallas_call", interpreted)
    draw = np.random.default_rng(1).normal
    arrays, cotangent = [draw(size=SHAPE), draw(size=SHAPE[-1:])], draw(size=SHAPE)
    kernel, formula = (partial(run, backend=name) for name in ("triton", "reference"))
    got = value_and_gradients(kernel, arrays, cotangent, dtype="float32")
    want = value_and_gradients(formula, arrays, cotangent, dtype="float64")
    assert_close(got, want, 1e-6)


def test_both_passes_become_gpu_programs() -> None:
    def step(heads: Any, scale: Any) -> Any:
        out, pull = jax.vjp(partial(run, backend="triton"), heads, scale)
        return pull(out)

    arguments = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16), jax.ShapeDtypeStruct(SHAPE[-1:], "f4")
    lowered = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 2


def test_a_decoder_computes_the_same_with_it() -> None:
    graph, params = build(DecoderConfig(97, 16, 2, 2, 1, 8, 32), 0)
    tokens = jnp.arange(12)[None]

    @jax.jit
    def hidden(params: Any) -> Any:
        return nnx.merge(graph, params).apply(tokens)

    apart = hidden(params)
    with use_kernels(rotary_norm="reference"):
        together = hidden(params)
    np.testing.assert_allclose(together, apart, atol=1e-5)
