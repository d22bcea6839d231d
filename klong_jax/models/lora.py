"""Low-rank adapters beside frozen matrices (LoRA, Hu et al. 2021).

A matrix W that is adapted gives x W + (alpha / rank) x A B. A is random and B zero at first, so
training starts from the model as it is. Adapters live under their matrix, as in
blocks.query.lora.lora_a, with the same leading layer axis.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from klong_jax.core.errors import UserError
from klong_jax.models.config import DecoderConfig, DTypes, LoraConfig
from klong_jax.models.decoder import Decoder, Params
from klong_jax.models.layers import Linear, stacked

ADAPTERS = ("*.lora_a", "*.lora_b")
"""Patterns of the names of adapters."""

# Uniform up to the root of 1 / inputs, as in the authors' own code and in PEFT.
_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def adapt(
    graph: nnx.GraphDef[Decoder], params: Params, config: LoraConfig, dtypes: DTypes, seed: int
) -> tuple[nnx.GraphDef[Decoder], Params]:
    """A decoder with fresh adapters; it shares the arrays of the one that is given.

    Args:
        graph: The decoder.
        params: Its parameters.
        config: The adapters.
        dtypes: The decoder's; adapters are held in float32 at least.
        seed: The adapters follow from it.

    Raises:
        UserError: The decoder has no matrix of a name.
    """
    decoder = nnx.merge(graph, params)
    _attach(decoder, config, dtypes, seed)
    adapted, params = nnx.split(decoder)
    return adapted, params


def abstract_adapted(
    model: DecoderConfig, config: LoraConfig, dtypes: DTypes
) -> tuple[nnx.GraphDef[Decoder], Params]:
    """The graph of an adapted decoder, and its parameters' shapes: takes no memory."""

    def make() -> Decoder:
        decoder = Decoder(model, dtypes, rngs=nnx.Rngs(params=0))
        _attach(decoder, config, dtypes, 0)
        return decoder

    graph, params = nnx.split(nnx.eval_shape(make))
    return graph, params


def adapted_matrices(params: Params) -> Params:
    """The matrices that adapters stand beside, each under its path."""
    stems = {path[:-2] for path, _ in nnx.to_flat_state(params) if path[-1] == "lora_a"}
    return nnx.split_state(
        params, lambda path, _: path[-1] == "kernel" and path[:-1] in stems, ...
    )[0]


def merge_adapters(params: Params, config: LoraConfig) -> Params:
    """The parameters of the plain decoder that does what an adapted one does.

    Matrices are added in float32 at least and have the dtype and the place that they had; what is
    not adapted is shared.

    Args:
        params: Those of the adapted decoder.
        config: Its adapters.
    """
    flat = dict(nnx.to_flat_state(params))
    for path in [path for path in flat if path[-1] == "lora_a"]:
        stem = path[:-2]
        low, high = flat.pop(path), flat.pop((*stem, "lora", "lora_b"))
        kernel = flat[*stem, "kernel"]
        add = jax.jit(_add, static_argnums=3, out_shardings=kernel[...].sharding)
        flat[*stem, "kernel"] = kernel.replace(add(kernel[...], low[...], high[...], config.scale))
    return nnx.from_flat_state(flat)


def _add(
    kernel: Float[Array, "l n m"],
    low: Float[Array, "l n r"],
    high: Float[Array, "l r m"],
    scale: float,
) -> Float[Array, "l n m"]:
    added = scale * jnp.matmul(low, high, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(added.dtype) + added).astype(kernel.dtype)


def _attach(decoder: Decoder, config: LoraConfig, dtypes: DTypes, seed: int) -> None:
    rngs = nnx.Rngs(params=seed)
    found = set()
    for path, layer in list(nnx.iter_modules(decoder)):
        if isinstance(layer, Linear) and path[-1] in config.targets and "experts" not in path:
            found.add(path[-1])
            layer.lora = _stack(layer, config.rank, dtypes, rngs)
            layer.lora_scale = config.scale
    _check(config.targets, found)


def _stack(layer: Linear, rank: int, dtypes: DTypes, rngs: nnx.Rngs) -> nnx.LoRA:
    """The adapters of a matrix in all layers of its stack."""

    def make(rngs: nnx.Rngs) -> nnx.LoRA:
        return nnx.LoRA(
            layer.in_features,
            rank,
            layer.out_features,
            dtype=dtypes.compute,
            param_dtype=jnp.promote_types(dtypes.params, jnp.float32),
            a_initializer=_INIT,
            rngs=rngs,
        )

    return stacked(make, layer.kernel.shape[0], rngs)


def _check(targets: Sequence[str], found: set[Any]) -> None:
    for target in targets:
        if target not in found:
            raise UserError(
                f"lora.targets={target}: the model has no such matrix outside its routed experts, "
                "which are not adapted; leave it out."
            )
