"""Attention on a GPU of rows that hold several windows: one flash call, a sequence a segment.

The call knows sequences by where they start and how long they are, so it computes nothing of what
one segment would see of another. How many there are is part of its shape; rows have fewer.
"""

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from klong_jax.core.errors import UserError
from klong_jax.kernels.attention.mask import SAVED
from klong_jax.kernels.backend import device_kind, on_hopper, platform
from klong_jax.kernels.limits import MOST_SEGMENTS

Heads = Float[Array, "b t h d"]
Keys = Float[Array, "b t k d"]


class Spans(NamedTuple):
    """Where the segments of each row stand; those that a row does not have are no tokens long."""

    starts: Int[Array, "b m"]
    lengths: Int[Array, "b m"]


def takes(query: Heads) -> bool:
    """Whether cuDNN packs here: on Hopper GPUs, and with offsets that 32 bits hold."""
    return on_hopper() and query.size <= jnp.iinfo(jnp.int32).max


def attention(
    query: Heads,
    key: Keys,
    value: Keys,
    segments: Int[Array, "b t"],
    causal: bool,
    scale: float,
    flash: ModuleType | Any,
) -> Heads:
    """Attends; zeros where a token belongs to no segment.

    Raises:
        UserError: The GPU is none that cuDNN packs on.
    """
    if platform() == "gpu" and not takes(query):
        raise UserError(
            f"attention: backend gpu takes windows that share a row on Hopper GPUs only, and less "
            f"than 2**31 numbers of queries, not {query.shape} on {device_kind()}; leave the "
            "choice of the backend free, or pack no windows."
        )
    return _attend(query, key, value, segments, flash, causal, scale)


def spans(segments: Int[Array, "b t"]) -> Spans:
    """Of segments that are numbered from 1 in their order, from a row's first token on."""
    numbers = 1 + jnp.arange(min(MOST_SEGMENTS, segments.shape[1]))
    lengths = jnp.sum(segments[:, None] == numbers[:, None], axis=2, dtype=jnp.int32)
    return Spans(jnp.cumsum(lengths, axis=1) - lengths, lengths)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(
    query: Heads,
    key: Keys,
    value: Keys,
    segments: Int[Array, "b t"],
    flash: Any,
    causal: bool,
    scale: float,
) -> Heads:
    return _forward(query, key, value, segments, flash, causal, scale)[0]


Residuals = tuple[Heads, Keys, Keys, Int[Array, "b t"], Heads, Float[Array, "b h t"]]


def _forward(
    query: Heads,
    key: Keys,
    value: Keys,
    segments: Int[Array, "b t"],
    flash: Any,
    causal: bool,
    scale: float,
) -> tuple[Heads, Residuals]:
    where = spans(segments)
    out, totals = flash.forward_packed(query, key, value, where, causal, scale)
    out = checkpoint_name(_real(segments, out), SAVED)
    # Kept a token, not a token of every sequence that there might be.
    log_total = checkpoint_name(_by_token(totals, where, segments), SAVED)
    return out, (query, key, value, segments, out, log_total)


def _backward(
    flash: Any, causal: bool, scale: float, residuals: Residuals, d_out: Heads
) -> tuple[Heads, Keys, Keys, None]:
    query, key, value, segments, out, log_total = residuals
    where = spans(segments)
    totals = _by_segment(log_total, where)
    gradients = flash.backward_packed(query, key, value, where, causal, scale, totals, out, d_out)
    d_query, d_key, d_value = (_real(segments, each) for each in gradients)
    return d_query, d_key, d_value, None


_attend.defvjp(_forward, _backward)


def _real(segments: Int[Array, "b t"], x: Float[Array, "b t n d"]) -> Array:
    """Zeros where a call wrote nothing."""
    return jnp.where((segments > 0)[:, :, None, None], x, 0)


def _by_token(
    totals: Float[Array, "b m h t"], where: Spans, segments: Int[Array, "b t"]
) -> Float[Array, "b h t"]:
    """From each token of each segment to each token of the row; zero where it is of none."""
    own = jnp.maximum(segments - 1, 0)
    places = jnp.arange(segments.shape[1]) - jnp.take_along_axis(where.starts, own, axis=1)
    rows = jnp.arange(segments.shape[0])[:, None]
    return jnp.where((segments > 0)[:, None], totals[rows, own, :, places].swapaxes(1, 2), 0)


def _by_segment(log_total: Float[Array, "b h t"], where: Spans) -> Float[Array, "b m h t"]:
    """The inverse of `_by_token`; zero behind a segment's last token."""
    places = jnp.arange(log_total.shape[2])
    real: Bool[Array, "b m t"] = places < where.lengths[:, :, None]
    index = jnp.where(real, where.starts[:, :, None] + places, 0)
    taken = jax.vmap(lambda row, at: row[:, at].swapaxes(0, 1))(log_total, index)
    return jnp.where(real[:, :, None], taken, 0)
