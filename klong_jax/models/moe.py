"""A mixture of experts: a router, experts that each take some tokens, one that may take all."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from klong_jax.models.config import DTypes, MoeConfig
from klong_jax.models.experts import Counted, ExpertWeights, mixture
from klong_jax.models.layers import INIT, Mlp, stacked, swiglu


class Router(nnx.Module):
    """Scores experts; used in float32 whatever the rest is computed in, the bias also held so."""

    def __init__(self, width: int, config: MoeConfig, dtypes: DTypes, *, rngs: nnx.Rngs) -> None:
        shape = (width, config.num_experts)
        self.kernel = nnx.Param(INIT(rngs.params(), shape, dtypes.params))
        if config.router_bias:
            precision = jnp.promote_types(dtypes.params, jnp.float32)
            self.bias = nnx.Param(jnp.zeros(config.num_experts, precision))


class Moe(nnx.Module):
    """Stands in the place of an MLP."""

    def __init__(self, width: int, config: MoeConfig, dtypes: DTypes, *, rngs: nnx.Rngs) -> None:
        self.config, self.dtypes = config, dtypes

        def expert(rngs: nnx.Rngs) -> Mlp:
            return Mlp(width, config.expert_size, dtypes, rngs=rngs)

        self.router = Router(width, config, dtypes, rngs=rngs)
        self.experts = stacked(expert, config.num_experts, rngs)
        if config.shared_size:
            self.shared = Mlp(width, config.shared_size, dtypes, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t w"], counted: Counted = None
    ) -> tuple[Array, Int[Array, " e"]]:
        """What the experts make of each token, and how many counted tokens each was given."""
        bias = self.router.bias[...] if self.config.router_bias else None
        weights = ExpertWeights(*(_kernel(self.experts, n) for n in ("gate", "up", "down")))
        y, load = mixture(x, self.router.kernel[...], bias, weights, self.config, counted)
        if self.config.shared_size:
            y = y + swiglu(self.shared, x)
        return y, load


def _kernel(experts: Any, name: str) -> Float[Array, "e n m"]:
    layer: nnx.Linear = getattr(experts, name)
    return layer.kernel[...].astype(layer.dtype)
