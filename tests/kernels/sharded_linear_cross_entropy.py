"""Run on eight devices: cross-entropy spread over tokens and vocabulary equals it on one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from klong_jax.kernels.linear_cross_entropy import linear_cross_entropy
from klong_jax.parallel.mesh import MeshShape, make_mesh
from klong_jax.parallel.rules import use_mesh

ROWS, LENGTH, WIDTH, VOCAB = 8, 512, 16, 1024
MESHES = [
    MeshShape(fsdp=8),
    MeshShape(fsdp=4, tensor=2),
    MeshShape(context=4, tensor=2),
    MeshShape(data=2, expert=2, context=2),
    MeshShape(data=2, tensor=4),
]


def step(
    hidden: jax.Array, embedding: jax.Array, weights: jax.Array, targets: jax.Array
) -> tuple[jax.Array, ...]:
    def loss(hidden: jax.Array, embedding: jax.Array, weights: jax.Array) -> jax.Array:
        out = linear_cross_entropy(hidden, embedding, targets, weights, tile=(128, 200))
        return out.weighted_sum + jnp.sum(weights**2 * out.entropies)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(hidden, embedding, weights)
    return value, *gradients


def main() -> None:
    """Compares every mesh with one device, and the sizes of all buffers with the table's."""
    rng = np.random.default_rng(0)
    hidden = jnp.float32(rng.normal(size=(ROWS, LENGTH, WIDTH)))
    embedding = jnp.float32(rng.normal(size=(VOCAB, WIDTH)))
    weights = jnp.float32(rng.normal(size=(ROWS, LENGTH)))
    targets = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)))
    want = jax.jit(step)(hidden, embedding, weights, targets)
    share = ROWS * LENGTH * VOCAB // 8
    for shape in MESHES:
        mesh = make_mesh(shape)
        tokens = PartitionSpec(("data", "fsdp", "expert"), "context")
        specs = tokens, PartitionSpec("tensor", ("fsdp", "context")), tokens, tokens
        arrays = [
            jax.device_put(array, NamedSharding(mesh, spec))
            for array, spec in zip((hidden, embedding, weights, targets), specs, strict=True)
        ]
        with use_mesh(mesh):
            compiled = jax.jit(step).lower(*arrays).compile()
        for one, other in zip(compiled(*arrays), want, strict=True):
            scale = float(jnp.abs(other).max())
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)
        shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
        largest = max(int(np.prod([int(size) for size in dims.split(",")])) for dims in shapes)
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        assert largest < share / 2, f"{shape}: a buffer of {largest} numbers"
        assert temporaries < 4 * share, f"{shape}: {temporaries} bytes of temporaries"
        print(f"{shape!s:32} equal; largest buffer {largest} of {share} logits a device")


if __name__ == "__main__":
    main()
