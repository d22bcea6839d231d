"""Attention on a GPU as two flash calls, on the prefix and on the window, merged afterwards.

cuDNN's causal mask lets queries and keys begin together, so one call cannot take a window after a
prefix. Two can: log-sum-exps say how much of the softmax each has. In the backward pass each call
is told the merged output and log-sum-exp, and gives its part of the gradient exactly.
"""

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from klong_jax.kernels.attention import packed
from klong_jax.kernels.attention.mask import SAVED, WindowMask

Heads = Float[Array, "b t h d"]
Keys = Float[Array, "b s k d"]
Totals = Float[Array, "b h t"]


class Part(NamedTuple):
    """Keys that one call takes, with how many of them each row has; all if None."""

    key: Keys
    value: Keys
    lengths: Int[Array, "b"] | None


def attention(
    query: Heads,
    key: Keys,
    value: Keys,
    mask: WindowMask,
    scale: float,
    *,
    flash: ModuleType | Any = None,
) -> Heads:
    """Attends.

    Args:
        query: Queries, in 16 bits if flash is cuDNN.
        key: Keys.
        value: Values.
        mask: What a query sees; its positions must be None.
        scale: What scores are multiplied with.
        flash: Holds `forward` and `backward`, and those of packed rows, as the module cudnn does,
            which is taken if None.
    """
    if flash is None:
        # Here and not above: JAX's private module is imported where it is used only.
        from klong_jax.kernels.attention import cudnn

        flash = cudnn
    if mask.segments is not None:
        return packed.attention(query, key, value, mask.segments, mask.causal, scale, flash)
    prefix = mask.prefix
    # Causal, a query past its row's tokens sees them, not they it; its output is cut off below.
    lengths = None if mask.causal else mask.lengths
    parts: tuple[Part, ...] = (Part(key[:, prefix:], value[:, prefix:], lengths),)
    if prefix:
        parts = (*parts, Part(key[:, :prefix], value[:, :prefix], mask.prefix_lengths))
    return mask.zero_padding(_merged(query, parts, flash, mask.causal, scale))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _merged(query: Heads, parts: tuple[Part, ...], flash: Any, causal: bool, scale: float) -> Heads:
    return _forward(query, parts, flash, causal, scale)[0]


Residuals = tuple[Heads, tuple[Part, ...], Heads, Totals]


def _forward(
    query: Heads, parts: tuple[Part, ...], flash: Any, causal: bool, scale: float
) -> tuple[Heads, Residuals]:
    outs, log_totals = [], []
    for index, part in enumerate(parts):
        out, log_total = flash.forward(query, *part, causal and index == 0, scale)
        outs.append(_where_any(part, out))
        log_totals.append(_where_any(part, log_total, -jnp.inf))
    out, log_total = outs[0], log_totals[0]
    if len(parts) > 1:
        log_total = _finite(jax.nn.logsumexp(jnp.stack(log_totals), axis=0))
        shares = (jnp.exp(each - log_total).swapaxes(1, 2)[..., None] for each in log_totals)
        merged = sum(out * share for out, share in zip(outs, shares, strict=True))
        out = jnp.asarray(merged).astype(query.dtype)
    out = checkpoint_name(out, SAVED)
    log_total = checkpoint_name(_finite(log_total), SAVED)
    return out, (query, parts, out, log_total)


def _backward(
    flash: Any, causal: bool, scale: float, residuals: Residuals, d_out: Heads
) -> tuple[Heads, tuple[Part, ...]]:
    query, parts, out, log_total = residuals
    d_query, d_parts = jnp.zeros_like(query), []
    for index, part in enumerate(parts):
        gradients = flash.backward(
            query, *part, causal and index == 0, scale, log_total, out, d_out
        )
        d_one, d_key, d_value = (_where_any(part, each) for each in gradients)
        d_query += d_one
        d_parts.append(Part(d_key, d_value, None))
    return d_query, tuple(d_parts)


_merged.defvjp(_forward, _backward)


def _finite(log_total: Totals) -> Totals:
    return jnp.where(jnp.isfinite(log_total), log_total, 0)


def _where_any(part: Part, x: Array, other: float = 0) -> Array:
    """What a call gave, but for rows that have no key at all."""
    if part.lengths is None:
        return x
    return jnp.where((part.lengths > 0).reshape(-1, *(1,) * (x.ndim - 1)), x, other)
