"""Logits on Hopper GPUs: what is asked of them leaves the multiprocessor, and they do not.

In memory they would be 4 bytes for every 2 d operations, written once and read twice or thrice,
which takes about as long as to compute them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from klong_jax.kernels import hopper
from klong_jax.kernels.hopper import HALF, STEP, STORED
from klong_jax.kernels.linear_cross_entropy.tiled import Backend, Known, Softmax, Tile, cut

_WIDE = 2 * HALF


def _softmax(
    hidden: Float[Array, "n d"],
    embedding: Float[Array, "v d"],
    targets: Int[Array, "n"],
    tile: Tile,
) -> Softmax:
    def block(states: Float[Array, "t d"]) -> tuple[Array, Array, Array]:
        tops, totals, moments = _statistics(states, embedding).swapaxes(0, 1)
        top = jnp.max(tops, axis=0)
        shares = jnp.exp(tops - top)
        return top, jnp.sum(totals * shares, axis=0), jnp.sum(moments * shares, axis=0)

    count, vocab = targets.shape[0], embedding.shape[0]
    top, total, moment = (
        part.reshape(-1)[:count] for part in jax.lax.map(block, cut(hidden, tile))
    )
    rows = embedding[jnp.clip(targets, 0, vocab - 1)].astype(jnp.float32)
    target = jnp.sum(hidden.astype(jnp.float32) * rows, axis=1)
    inside = (targets >= 0) & (targets < vocab)
    return Softmax(top, total, moment, jnp.where(inside, target, 0))


def _statistics(states: Float[Array, "t d"], rows: Float[Array, "v d"]) -> Float[Array, "c 3 t"]:
    """Of each block of 128 rows: the greatest logit, and the sums of a Softmax."""
    tokens, vocab = states.shape[0], rows.shape[0]

    def body(states: Any, rows: Any, out: Any) -> None:
        def store(total: Any, scratch: Any, row: Any, column: Any) -> None:
            half = jax.lax.axis_index("half")
            logits = total[...]
            top = jnp.max(logits, axis=1)
            weights = jnp.exp(logits - _across(top, HALF))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch[half, 0] = top
            scratch[half, 1] = jnp.sum(weights, axis=1)
            scratch[half, 2] = jnp.sum(weights * logits, axis=1)
            plgpu.commit_smem()
            to = out.at[column // HALF, :, pl.ds(row, HALF)]
            plgpu.copy_smem_to_gmem(scratch.at[half], to)

        _each_tile(states, rows, store, plgpu.SMEM((2, 3, HALF), jnp.float32))

    shape = 2 * pl.cdiv(vocab, _WIDE), 3, pl.cdiv(tokens, HALF) * HALF
    run = hopper.kernel(body, jax.ShapeDtypeStruct(shape, jnp.float32))
    # Half of the last tile may be past the vocabulary.
    return run(_whole(states), rows)[: vocab // HALF, :, :tokens]


def _d_logits(
    states: Float[Array, "t d"], rows: Float[Array, "r d"], known: Known
) -> Float[Array, "t r"]:
    tokens = states.shape[0]
    # d log p(target) / d logits = [target] - p;  dH / d logits = -p (log p + H): in all
    # [target] chosen - exp(l - log_total) (plain + pull l).
    plain = known.d_logprob + known.d_entropy * (known.entropy - known.log_total)
    each = known.log_total, plain, known.d_entropy, known.d_logprob

    def body(states: Any, rows: Any, target: Any, each: Any, out: Any) -> None:
        def store(total: Any, scratch: Any, row: Any, column: Any) -> None:
            half = jax.lax.axis_index("half")

            def along(vector: Any) -> Any:
                layout = plgpu.Layout.WGMMA.reduce(1)
                there = plgpu.load(vector, (pl.ds(row, HALF),), layout=layout, optimized=False)
                return _across(there, STORED)

            log_total, plain, pull, chosen = (along(each.at[index]) for index in range(4))
            wanted, accumulated = along(target), total[...]
            for part in range(0, HALF, STORED):
                logits = hopper.columns_of(accumulated, part)
                here = hopper.indices((HALF, STORED), 1) + (column + part) == wanted
                made = jnp.where(here, chosen, 0.0)
                made -= jnp.exp(logits - log_total) * (plain + pull * logits)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                scratch[half] = made.astype(out.dtype)
                plgpu.commit_smem()
                to = out.at[pl.ds(row, HALF), pl.ds(column + part, STORED)]
                plgpu.copy_smem_to_gmem(scratch.at[half], to)

        dtype = out.dtype
        scratch = plgpu.SMEM((2, HALF, STORED), dtype, transforms=hopper.transforms(dtype))
        _each_tile(states, rows, store, scratch)

    padded = _whole(states)
    run = hopper.kernel(body, jax.ShapeDtypeStruct((padded.shape[0], rows.shape[0]), states.dtype))
    target = _whole(known.target.astype(jnp.int32))
    return run(padded, rows, target, _whole(jnp.stack(each, axis=1)).T)[:tokens]


def _each_tile(states: Any, rows: Any, store: Callable[..., None], scratch: Any) -> None:
    """Multiplies all states with all rows; `store` is given each product, 128 x 128."""
    (tokens, width), dtype = states.shape, states.dtype
    down, across = pl.cdiv(tokens, HALF), pl.cdiv(rows.shape[0], _WIDE)

    def multiply(_: Any, left: Any, right: Any, total: Any) -> Any:
        plgpu.wgmma(total, left, right.at[hopper.my_half()].transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return total

    def tile(index: Any, run: hopper.Run, scratch: Any) -> None:
        row, column = index % down * HALF, index // down * _WIDE
        mine = column + jax.lax.axis_index("half") * HALF
        left, right = states.at[pl.ds(row, HALF)], rows.at[pl.ds(column, _WIDE)]
        run(multiply, lambda total: store(total, scratch, row, mine), width // STEP, left, right)

    blocks = [
        hopper.block((height, STEP), lambda step: (0, step), dtype) for height in (HALF, _WIDE)
    ]
    hopper.each_tile(tile, down * across, blocks, (states, rows), scratch)


def _across(vector: Any, columns: int) -> Any:
    return jax.lax.broadcast_in_dim(vector, (HALF, columns), [0])


def _whole(x: Array) -> Array:
    """Padded to whole tiles of tokens."""
    return jnp.pad(x, ((0, -x.shape[0] % HALF), *((0, 0),) * (x.ndim - 1)))


BACKEND = Backend(_softmax, _d_logits)
