"""cuDNN's flash attention with the log-sum-exp that JAX's public function does not differentiate.

The forward pass gives it, and the backward pass takes whatever output and log-sum-exp it is told:
those of a softmax over more keys than the call's own give the call's part of the gradient.
"""

from typing import Any

import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jaxtyping import Array, Float, Int

Heads = Float[Array, "b t h d"]
Keys = Float[Array, "b s k d"]
Totals = Float[Array, "b h t"]


def forward(
    query: Heads,
    key: Keys,
    value: Keys,
    key_lengths: Int[Array, "b"] | None,
    causal: bool,
    scale: float,
) -> tuple[Heads, Totals]:
    """Output and log-sum-exp; queries and keys begin together if causal."""
    out: tuple[Heads, Totals] = fused.dot_product_attention(
        query,
        key,
        value,
        q_seqlen=_query_lengths(query, key_lengths),
        kv_seqlen=key_lengths,
        scale=scale,
        mask_type=_mask_type(key_lengths, causal),
        return_residual=True,
    )
    return out


def backward(
    query: Heads,
    key: Keys,
    value: Keys,
    key_lengths: Int[Array, "b"] | None,
    causal: bool,
    scale: float,
    log_total: Totals,
    out: Heads,
    d_out: Heads,
) -> tuple[Heads, Keys, Keys]:
    """Gradients of queries, keys and values."""
    unused = jnp.zeros(0, query.dtype)
    lengths: Any = _query_lengths(query, key_lengths), key_lengths
    lengths = (unused, unused) if key_lengths is None else lengths
    gradients: tuple[Heads, Keys, Keys] = fused._dot_product_attention_bwd_p_wrapper.bind(
        query,
        key,
        value,
        unused,
        *lengths,
        *(unused,) * 4,
        log_total,
        out,
        d_out,
        scale=scale,
        seed=42,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=_mask_type(key_lengths, causal),
        layout=fused.AttentionLayout.BTNH.value,
        sliding_window_length=None,
    )
    return gradients


def _mask_type(key_lengths: Int[Array, "b"] | None, causal: bool) -> fused.MaskType:
    if key_lengths is not None:
        return fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING
    return fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK


def _query_lengths(query: Heads, key_lengths: Int[Array, "b"] | None) -> Int[Array, "b"] | None:
    if key_lengths is None:
        return None
    return jnp.full(query.shape[0], query.shape[1], jnp.int32)
