"""cuDNN's flash attention with the log-sum-exp that JAX's public function does not differentiate.

The forward pass gives it, and the backward pass takes whatever output and log-sum-exp it is told:
those of a softmax over more keys than the call's own give the call's part of the gradient.

Packed rows hold several sequences. JAX 0.10 finds the keys of theirs by the number of queries'
heads, which is wrong where those of keys are fewer; so offsets are computed here.
"""

from typing import Any

import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jaxtyping import Array, Float, Int

from klong_jax.kernels.attention.packed import Spans

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
        **_options(key_lengths, causal, scale),
    )
    return gradients


def forward_packed(
    query: Heads, key: Keys, value: Keys, spans: Spans, causal: bool, scale: float
) -> tuple[Heads, Float[Array, "b m h t"]]:
    """Output and, of each sequence's tokens from its first on, log-sum-exp.

    Where a row has no sequence neither is written.
    """
    unused = jnp.zeros(0, query.dtype)
    out, totals = fused._dot_product_attention_fwd_p.bind(
        query,
        key,
        value,
        unused,
        *_sequences(query, key, spans),
        unused,
        unused,
        is_training=True,
        **_options(None, causal, scale),
    )
    return out, totals.reshape(*spans.lengths.shape, *totals.shape[1:])


def backward_packed(
    query: Heads,
    key: Keys,
    value: Keys,
    spans: Spans,
    causal: bool,
    scale: float,
    log_total: Float[Array, "b m h t"],
    out: Heads,
    d_out: Heads,
) -> tuple[Heads, Keys, Keys]:
    """Gradients of queries, keys and values; not written where a row has no sequence."""
    unused = jnp.zeros(0, query.dtype)
    gradients: tuple[Heads, Keys, Keys] = fused._dot_product_attention_bwd_p.bind(
        query,
        key,
        value,
        unused,
        *_sequences(query, key, spans),
        unused,
        unused,
        log_total.reshape(-1, *log_total.shape[2:]),
        out,
        d_out,
        **_options(None, causal, scale),
    )
    return gradients


def _sequences(query: Heads, key: Keys, spans: Spans) -> tuple[Int[Array, "b m"], ...]:
    """Lengths of queries' and of keys' sequences, and where each starts, counted in numbers."""
    batch, tokens = query.shape[:2]
    starts = (spans.starts + tokens * jnp.arange(batch)[:, None]).reshape(-1)
    # One more than there are sequences, and a whole table: the end of the last row.
    starts = jnp.pad(starts, (0, batch), constant_values=batch * tokens).reshape(batch, -1)
    offsets = (starts * x.shape[2] * x.shape[3] for x in (query, key))
    return (spans.lengths, spans.lengths, *(each.astype(jnp.int32) for each in offsets))


def _options(key_lengths: Int[Array, "b"] | None, causal: bool, scale: float) -> dict[str, Any]:
    return {
        "scale": scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": _mask_type(key_lengths, causal),
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }


def _mask_type(key_lengths: Int[Array, "b"] | None, causal: bool) -> fused.MaskType:
    if key_lengths is not None:
        return fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING
    return fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK


def _query_lengths(query: Heads, key_lengths: Int[Array, "b"] | None) -> Int[Array, "b"] | None:
    if key_lengths is None:
        return None
    return jnp.full(query.shape[0], query.shape[1], jnp.int32)
