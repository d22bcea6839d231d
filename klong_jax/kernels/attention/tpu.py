"""Attention by the splash Pallas kernels.

The kernels' own masks are built on the host in time quadratic in the length. Here what a query sees
is its first key and its last, and which blocks of keys a block of queries needs follows from the
least and the greatest of these; so it may also depend on the device, as it does where the window is
spread over several, and on which windows share a row. The backward pass is the one in two kernels:
the fused one's memory grows with the square of the length.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from klong_jax.kernels.attention.mask import SAVED, WindowMask, segment_starts

_LANES = 128
_MOST_QUERIES, _MOST_KEYS, _MOST_KEYS_AT_ONCE = 512, 1024, 512


def attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k d"],
    mask: WindowMask,
    scale: float,
    *,
    interpret: bool = False,
) -> Float[Array, "b t h d"]:
    """Attends.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        mask: What a query sees.
        scale: What scores are multiplied with.
        interpret: Run the kernels on a CPU, step by step.
    """
    batch, length, _, _ = query.shape
    keys = key.shape[1]
    block_q, block_kv = _block(length, _MOST_QUERIES), _block(keys, _MOST_KEYS)
    pad_q, pad_kv = -length % block_q, -keys % block_kv
    positions = mask.query_positions(length)
    last = mask.prefix + positions if mask.causal else jnp.full(length, keys - 1)
    first = None
    if mask.segments is not None:
        # Blocks are the same for all rows: from the first key that any of them needs.
        first = segment_starts(mask.segments).min(axis=0)[positions]
    kernel = _kernel(
        jnp.pad(last, (0, pad_q)),
        None if first is None else jnp.pad(first, (0, pad_q), constant_values=keys - 1),
        keys + pad_kv,
        block_q,
        block_kv,
        interpret,
    )

    def heads_first(x: Float[Array, "b n m d"], pad: int) -> Float[Array, "b m p d"]:
        return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2)

    segments = _segment_ids(mask, batch, length, keys)
    if segments is not None:
        segments = SegmentIds(
            jnp.pad(segments.q, ((0, 0), (0, pad_q))), jnp.pad(segments.kv, ((0, 0), (0, pad_kv)))
        )
    each_row: Any = jax.vmap(kernel)
    out: Array = each_row(
        heads_first(query * scale, pad_q),
        heads_first(key, pad_kv),
        heads_first(value, pad_kv),
        segments,
    )
    return mask.zero_padding(out.swapaxes(1, 2)[:, :length])


def _kernel(
    last: Int[Array, "t"],
    first: Int[Array, "t"] | None,
    keys: int,
    block_q: int,
    block_kv: int,
    interpret: bool,
) -> SplashAttentionKernel:
    """The kernel for queries that see keys up to their last, from their first on if there is one.

    What a query does not see in between is left to segment ids.
    """
    blocks = last.reshape(-1, block_q)
    starts = jnp.arange(0, keys, block_kv)
    some = blocks.max(axis=1, keepdims=True) >= starts
    if first is not None:
        some &= first.reshape(-1, block_q).min(axis=1, keepdims=True) < starts + block_kv
    whole = blocks.min(axis=1, keepdims=True) >= starts + block_kv - 1
    block_mask = jnp.where(whole, 2, jnp.where(some, 1, 0))[None].astype(jnp.int8)
    # What is loaded at a step: where there is nothing to do, what is there already or comes next.
    before = jnp.argmax(some, axis=1, keepdims=True)
    most = before + jnp.sum(some, axis=1, keepdims=True) - 1
    kv_index = jnp.clip(jnp.arange(starts.size), before, most)
    q_index = jnp.where(some, jnp.arange(blocks.shape[0])[:, None], jnp.argmax(some, axis=0))

    queries: Any = last.astype(jnp.int32)

    def info(index: Int[Array, "q k"]) -> MaskInfo:
        small = jnp.int8 if max(index.shape) <= jnp.iinfo(jnp.int8).max else jnp.int16
        return MaskInfo(index[None].astype(small), None, block_mask, None, queries)

    at_once = _block_within(block_kv, _MOST_KEYS_AT_ONCE)
    return SplashAttentionKernel(
        info(kv_index),
        info(kv_index),
        info(q_index),
        block_sizes=BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=at_once,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=at_once,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=SAVED,
        mask_function=_sees,
        interpret=interpret,
    )


def _sees(last: Int[Array, "q k"], key: Int[Array, "q k"]) -> Bool[Array, "q k"]:
    return key <= last


def _segment_ids(mask: WindowMask, batch: int, length: int, keys: int) -> SegmentIds | None:
    """Ids of queries and keys; a query sees keys of its own id. None if each sees all.

    Padding sees padding; what it gives is cut off.
    """
    if mask.segments is not None:
        return SegmentIds(mask.segments[:, mask.query_positions(length)], mask.segments)
    hidden = _hidden_keys(mask, batch, keys)
    if hidden is None:
        return None
    # Queries are segment 0; a key of another one is seen by none.
    return SegmentIds(jnp.zeros((batch, length), jnp.int32), hidden.astype(jnp.int32))


def _hidden_keys(mask: WindowMask, batch: int, keys: int) -> Bool[Array, "b s"] | None:
    """Keys that no query of the row sees, whatever its position."""
    index = jnp.arange(keys)
    hidden = jnp.zeros((batch, keys), bool)
    if mask.prefix_lengths is not None:
        hidden |= (index < mask.prefix) & (index >= mask.prefix_lengths[:, None])
    if mask.lengths is not None and not mask.causal:
        hidden |= index - mask.prefix >= mask.lengths[:, None]
    elif mask.prefix_lengths is None:
        return None
    return hidden


def _block(length: int, most: int) -> int:
    """Even blocks of whole lanes."""
    count = -(-length // most)
    return -(-length // (count * _LANES)) * _LANES


def _block_within(block: int, most: int) -> int:
    """The largest number of whole lanes up to `most` that divides a block."""
    return next(size for size in range(most, 0, -_LANES) if block % size == 0)
