"""Mesh and kernels of the settings are those that programs are traced under."""

import jax
import jax.numpy as jnp
import pytest

from klong_jax.core.errors import UserError
from klong_jax.kernels.linear_cross_entropy import linear_cross_entropy
from klong_jax.pipelines.config.pods import KernelsSection, MeshSection
from klong_jax.pipelines.process import computing, device_mesh

MESH = MeshSection(data=1, fsdp=0, expert=1, context=1, tensor=1)


def holds_all_logits(kernels: KernelsSection) -> bool:
    """Whether a loss over 40 tokens and 3000 words makes a table of both."""

    def loss(hidden: jax.Array) -> jax.Array:
        embedding, targets = jnp.ones((3000, 8)), jnp.zeros((1, 40), jnp.int32)
        return linear_cross_entropy(hidden, embedding, targets, jnp.ones((1, 40))).weighted_sum

    with computing(device_mesh(MESH), kernels):
        return "40x3000xf32" in jax.jit(loss).lower(jnp.ones((1, 40, 8))).as_text()


def test_kernels_are_those_of_the_settings() -> None:
    free = KernelsSection(
        attention=None, grouped_matmul=None, linear_cross_entropy=None, rotary_norm=None
    )
    plain = free.model_copy(update={"linear_cross_entropy": "reference"})
    assert (holds_all_logits(free), holds_all_logits(plain)) == (False, True)


def test_the_mesh_takes_all_devices() -> None:
    assert device_mesh(MESH).size == jax.device_count()
    with pytest.raises(UserError, match=r"tensor 3 takes 3 devices"):
        device_mesh(MESH.model_copy(update={"fsdp": 1, "tensor": 3}))
