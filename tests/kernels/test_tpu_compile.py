"""The Pallas kernels compile for a real TPU, in blocks that its memory holds."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from klong_jax.kernels.attention import attention
from klong_jax.kernels.grouped_matmul import grouped_matmul
from klong_jax.parallel.mesh import MeshShape, make_mesh
from klong_jax.parallel.rules import use_mesh
from klong_jax.parallel.topology import parse_topology


def compiled(mesh: MeshShape, function: Callable[..., Any], *shapes: tuple[int, ...]) -> Any:
    if find_spec("libtpu") is None:
        message = "compiling for TPUs needs libtpu"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    kinds = (jnp.bfloat16 if len(shape) > 1 else jnp.int32 for shape in shapes)
    arguments = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, kinds, strict=True)]
    with use_mesh(make_mesh(mesh, parse_topology("v5e:2x2").devices())):
        return jax.jit(function).lower(*arguments).compile()


def kernels(program: Any) -> int:
    return int(program.as_text().count('custom_call_target="tpu_custom_call"'))


@pytest.mark.slow
def test_splash_compiles_for_windows_spread_over_context() -> None:
    rows, window, keys = 2, 8192, 16384

    def step(query: Any, key: Any, value: Any, prefix: Any, lengths: Any) -> Any:
        def out(*arrays: Any) -> Any:
            return attention(*arrays, prefix_lengths=prefix, lengths=lengths)

        attended, pull = jax.vjp(out, query, key, value)
        return attended, *pull(attended)

    query, key = (rows, window, 8, 128), (rows, keys, 2, 128)
    mesh = MeshShape(fsdp=2, context=2)
    program = compiled(mesh, step, query, key, key, (rows,), (rows,))
    assert kernels(program) == 3  # Forward; gradients of queries; of keys and values.
    assert program.memory_analysis().temp_size_in_bytes < window * keys


@pytest.mark.slow
def test_megablox_compiles_for_the_experts_of_glm() -> None:
    def step(lhs: Any, rhs: Any, sizes: Any) -> Any:
        def local(lhs: Any, rhs: Any, sizes: Any) -> Any:
            out, pull = jax.vjp(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes), lhs, rhs)
            return out, *pull(out)

        whole = jax.sharding.PartitionSpec()
        return jax.shard_map(local, in_specs=(whole,) * 3, out_specs=(whole,) * 3, check_vma=False)(
            lhs, rhs, sizes
        )

    program = compiled(MeshShape(expert=4), step, (8192, 4096), (8, 4096, 1408), (8,))
    assert kernels(program) == 3  # Forward; gradients of rows; of matrices.
