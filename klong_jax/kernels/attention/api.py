"""Attention of a window of queries on a prefix and itself: the signature and the dispatch."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klong_jax.core.errors import UserError
from klong_jax.kernels.attention import cpu, gpu, packed, reference, sharded, tpu
from klong_jax.kernels.attention.mask import WindowMask
from klong_jax.kernels.attention.sharded import Backend
from klong_jax.kernels.backend import chosen, in_16_bits, platform
from klong_jax.kernels.placement import on_mesh

BACKENDS: Mapping[str, Backend] = {
    "reference": reference.attention,
    "cpu": cpu.attention,
    "gpu": gpu.attention,
    "tpu": tpu.attention,
}
"""Each takes queries, keys, values, the mask and the scale; cpu runs on every platform."""

_CUDNN_WIDEST = 128


def attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k d"],
    *,
    prefix_lengths: Int[Array, "b"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    segments: Int[Array, "b t"] | None = None,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Float[Array, "b t h d"]:
    """Attends from a window to the prefix before it and to itself.

    Queries are the last t of s keys. A query that sees nothing, as padding and empty windows do,
    gives zeros and gives no gradient.

    Args:
        query: Queries; h is a multiple of k.
        key: Keys.
        value: Values.
        prefix_lengths: How many of the first s - t keys a row has; all if None.
        lengths: How many of the t window tokens a row has; all if None.
        segments: Which of the windows that share a row each token belongs to: 1 from the row's
            first token on, then 2, and so on up to kernels.limits.MOST_SEGMENTS, and 0 behind the
            last; a query sees its own only. One window a row if None.
        causal: A query sees the window up to itself, not all of it.
        scale: What scores are multiplied with; d ** -0.5 if None.
        backend: One of BACKENDS; chosen by platform and shape if None.

    Raises:
        UserError: Shapes do not fit, or there is no such backend.
    """
    prefix = key.shape[1] - query.shape[1]
    if prefix < 0 or query.shape[2] % key.shape[2]:
        raise UserError(
            f"attention: queries of shape {query.shape} need at least as many keys as queries and "
            f"a number of heads that divides theirs, not keys of shape {key.shape}."
        )
    if segments is not None and (prefix or lengths is not None):
        raise UserError(
            "attention: windows that share a row have no prefix before them and no lengths beside "
            "their segments; leave one of the two out."
        )
    numbered = None if segments is None else jnp.asarray(segments)
    mask = WindowMask(prefix, causal, prefix_lengths, lengths, segments=numbered)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    asked = chosen("attention", backend, BACKENDS)

    def run(query: Array, key: Array, value: Array, mask: WindowMask, scale: float) -> Array:
        name = asked or _by_shape(query, key, value, mask)
        return BACKENDS[name](query, key, value, mask, scale)

    if on_mesh():
        return sharded.attention(run, query, key, value, mask, scale)
    return run(query, key, value, mask, scale)


def _by_shape(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k d"],
    mask: WindowMask,
) -> str:
    name = platform()
    width = query.shape[-1]
    if name == "gpu" and (
        not in_16_bits(query.dtype, key.dtype, value.dtype)
        or width > _CUDNN_WIDEST
        or width % 8
        or mask.positions is not None
        or (mask.segments is not None and not packed.takes(query))
    ):
        return "cpu"
    if name == "tpu" and query.dtype == jnp.float64:
        return "cpu"
    return name
