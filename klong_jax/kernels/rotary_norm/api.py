"""RMSNorm of each head, then its rotation: the signature and the dispatch.

Left to XLA, both passes read and write a layer's queries and keys several times over.
"""

from collections.abc import Callable, Mapping

import jax
from jaxtyping import Array, Float

from klong_jax.kernels.backend import chosen, in_16_bits, platform
from klong_jax.kernels.placement import on_mesh
from klong_jax.kernels.rotary_norm import reference, triton

BACKENDS: Mapping[str, Callable[..., Array]] = {
    "reference": reference.rotary_norm,
    "triton": triton.rotary_norm,
}
"""Each takes heads, scale, cosines, sines and epsilon; the reference runs on every platform."""


def takes(heads: Float[Array, "b t h d"], rotary_dim: int) -> bool:
    """Whether a kernel is there for these heads, on this platform and mesh."""
    width = heads.shape[-1]
    whole = rotary_dim == width and width.bit_count() == 1 and width >= 32
    asked = chosen("rotary_norm", None, BACKENDS)
    if asked is not None:
        return rotary_dim == width
    return platform() == "gpu" and in_16_bits(heads.dtype) and whole and not on_mesh()


def rotary_norm(
    heads: Float[Array, "b t h d"],
    scale: Float[Array, "d"],
    cos: Float[Array, "b t half"],
    sin: Float[Array, "b t half"],
    *,
    epsilon: float,
    backend: str | None = None,
) -> Float[Array, "b t h d"]:
    """Divides each head by its root mean square, scales it, and rotates its halves.

    Differentiable in heads and scale. Everything is computed in float32 at least.

    Args:
        heads: Queries or keys.
        scale: Of each dimension.
        cos: Cosines of each position's angles, one for each pair of dimensions.
        sin: Their sines.
        epsilon: Added to the mean square.
        backend: One of BACKENDS; chosen by platform if None.
    """
    asked = chosen("rotary_norm", backend, BACKENDS)
    name = asked or ("triton" if platform() == "gpu" else "reference")
    return BACKENDS[name](heads, scale, *jax.lax.stop_gradient((cos, sin)), epsilon)
