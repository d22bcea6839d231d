"""Linear maps, norms and the gated MLP, in the decoder's precisions."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from klong_jax.models.config import DTypes
from klong_jax.parallel.rules import constrain

INIT = nnx.initializers.normal(0.02)


class Linear(nnx.Linear):
    """A matrix, and beside it an adapter if it was given one (`lora`, `lora_scale`)."""

    def __call__(self, x: Float[Array, "*b n"]) -> Float[Array, "*b m"]:
        """What the matrix makes of rows, and what the adapter adds to that."""
        y = super().__call__(x)
        return y + self.lora_scale * self.lora(x) if hasattr(self, "lora") else y


def linear(n_in: int, n_out: int, dtypes: DTypes, rngs: nnx.Rngs, *, bias: bool = False) -> Any:
    """A matrix, with a bias if asked for."""
    return Linear(
        n_in,
        n_out,
        use_bias=bias,
        kernel_init=INIT,
        dtype=dtypes.compute,
        param_dtype=dtypes.params,
        rngs=rngs,
    )


def norm(size: int, epsilon: float, dtypes: DTypes, rngs: nnx.Rngs) -> Any:
    """RMSNorm; its statistics are taken in float32 at least."""
    return nnx.RMSNorm(
        size, epsilon=epsilon, dtype=dtypes.compute, param_dtype=dtypes.params, rngs=rngs
    )


def stacked(make: Callable[[nnx.Rngs], Any], count: int, rngs: nnx.Rngs) -> Any:
    """`count` modules in one, each parameter with a new leading axis."""
    split = nnx.split_rngs(splits=count)
    return split(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def on_tokens(layer: Callable[[Array], Array], x: Float[Array, "b t w"]) -> Float[Array, "b t v"]:
    """A layer on each token.

    On one device the tokens are one matrix: XLA's CPU backend is three times faster so. Under a
    mesh rows and positions may both be cut, and stay two dimensions.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return layer(x)
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class Mlp(nnx.Module):
    """A gated MLP (SwiGLU, Shazeer 2020)."""

    def __init__(self, width: int, size: int, dtypes: DTypes, *, rngs: nnx.Rngs) -> None:
        self.gate, self.up = linear(width, size, dtypes, rngs), linear(width, size, dtypes, rngs)
        self.down = linear(size, width, dtypes, rngs)


def swiglu(mlp: Any, x: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
    """What a module with the matrices `gate`, `up` and `down` makes of each token."""
    inner = jax.nn.silu(on_tokens(mlp.gate, x)) * on_tokens(mlp.up, x)
    return on_tokens(mlp.down, constrain(inner, "batch", "length", "mlp"))
