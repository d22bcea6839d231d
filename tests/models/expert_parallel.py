"""Compares a mixture over meshes of 8 devices with the same on one; run as a program."""

import json
import os

os.environ["JAX_ENABLE_X64"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from klong_jax.models.config import DecoderConfig, DTypes, MoeConfig
from klong_jax.models.decoder import build
from klong_jax.parallel.mesh import MeshShape, make_mesh
from klong_jax.parallel.rules import TRAINING, ShardingRules, param_shardings, use_mesh

CONFIG = DecoderConfig(
    64, 16, 3, 4, 4, 8, 32, tie_embeddings=False,
    moe=MoeConfig(16, 2, 8, "sigmoid", True, 8, 1, 1.5, True),
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 16)))
GRAPH, PARAMS = build(CONFIG, 0, DTypes("float64", "float64"))
# The last keeps a window's tokens on all devices of the expert axis: nothing to exchange.
MESHES = (
    (MeshShape(expert=2, context=2, tensor=2), TRAINING),
    (MeshShape(expert=2, fsdp=4), ShardingRules(batch=("fsdp",))),
)


@jax.jit
def loss_and_loads(params: object, tokens: jax.Array) -> tuple:
    def loss(params: object) -> tuple:
        decoder = nnx.merge(GRAPH, params)
        out = decoder.forward(tokens)
        logprobs = jax.nn.log_softmax(out.hidden @ decoder.output_embedding.T)
        return -jnp.take_along_axis(logprobs, tokens[..., None], -1).mean(), out.loads

    return jax.value_and_grad(loss, has_aux=True)(params)


def main() -> None:
    params = hostile(PARAMS)
    (loss, loads), grads = loss_and_loads(params, TOKENS)
    for shape, rules in MESHES:
        mesh = make_mesh(shape)
        with use_mesh(mesh, rules):
            placed = jax.device_put(params, param_shardings(params, mesh, rules))
            (got, got_loads), got_grads = loss_and_loads(placed, TOKENS)
        errors = jax.tree.map(
            lambda a, b: float(jnp.abs(np.asarray(a) - b).max() / (jnp.abs(b).max() + 1e-12)),
            got_grads,
            grads,
        )
        measured = {
            "mesh": str(shape),
            "rows over": " ".join(rules.batch),
            "loss": abs(float(got - loss)),
            "gradients": max(jax.tree.leaves(errors)),
            "loads_equal": bool((np.asarray(got_loads) == loads).all()),
        }
        print(json.dumps(measured))


def hostile(params: object) -> object:
    """Ten times the initial scale, and a bias that makes the router uneven."""
    rng = np.random.default_rng(1)

    def change(path: tuple, leaf: jax.Array) -> jax.Array:
        bias = "router" in jax.tree_util.keystr(path) and leaf.ndim == 2
        return jnp.asarray(rng.normal(size=leaf.shape, scale=0.5), leaf.dtype) if bias else leaf * 5

    return jax.tree_util.tree_map_with_path(change, params)


main()
