"""Grouped matrix multiplication on Hopper GPUs.

Tiles begin at their group's first row, rounded down for the copies. Where a group begins or ends
within a tile only its own rows are stored or, where rows are contracted, multiplied.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from klong_jax.kernels import hopper
from klong_jax.kernels.grouped_matmul.gradient import differentiable
from klong_jax.kernels.hopper import HALF, ROWS, STEP, STORED, Run


def _product(
    lhs: Float[Array, "m a"],
    rhs: Float[Array, "e k n"],
    group_sizes: Int[Array, "e"],
    *,
    transposed: bool,
) -> Float[Array, "m b"]:
    rows, inner = lhs.shape
    outer = rhs.shape[1] if transposed else rhs.shape[2]
    wide = 2 * HALF
    across = pl.cdiv(outer, wide)
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    starts = ends - group_sizes.astype(jnp.int32)
    shape, index = (
        ((wide, STEP), lambda s: (0, s)) if transposed else ((STEP, wide), lambda s: (s, 0))
    )
    blocks = [
        hopper.block((HALF, STEP), lambda step: (0, step), lhs.dtype),
        hopper.block(shape, index, rhs.dtype),
    ]

    def multiply(_: Any, left: Any, right: Any, total: Any) -> Any:
        mine = hopper.my_half()
        plgpu.wgmma(
            total, left, right.at[mine].transpose((1, 0)) if transposed else right.at[:, mine]
        )
        plgpu.wgmma_wait(0)
        return total

    def body(
        starts: Any, ends: Any, count: Any, group: Any, first: Any, lhs: Any, rhs: Any, out: Any
    ) -> None:
        def tile(index: Any, run: Run, scratch: Any) -> None:
            row, column = index // across, index % across * wide
            here, start = group[row], pl.multiple_of(first[row], ROWS)
            begin = jnp.maximum(starts[here] - start, 0)
            count = jnp.minimum(ends[here] - start, HALF) - begin

            def store(total: Any) -> None:
                half = jax.lax.axis_index("half")
                made = total[...].astype(out.dtype)
                for part in range(0, HALF, STORED):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    scratch[half] = hopper.columns_of(made, part)
                    plgpu.commit_smem()
                    strip = out.at[:, pl.ds(column + half * HALF + part, STORED)]
                    _store_rows(scratch.at[half], strip, begin, start + begin, count)

            strip, matrix = pl.ds(column, wide), rhs.at[here]
            right = matrix.at[strip] if transposed else matrix.at[:, strip]
            run(multiply, store, inner // STEP, lhs.at[pl.ds(start, HALF)], right)

        # Not swizzled, so that rows can be stored from any one on.
        scratch = plgpu.SMEM((2, HALF, STORED), out.dtype)
        hopper.each_tile(tile, count[0] * across, blocks, (lhs, rhs.at[0]), scratch)

    run = hopper.kernel(body, jax.ShapeDtypeStruct((rows, outer), lhs.dtype))
    return run(starts, ends, *_tiles(starts, ends, rows), lhs, rhs)


def _tiles(
    starts: Int[Array, "e"], ends: Int[Array, "e"], rows: int
) -> tuple[Int[Array, "1"], Int[Array, "n"], Int[Array, "n"]]:
    """How many tiles there are, each one's group and its first row."""
    aligned = starts // ROWS * ROWS
    counts = jnp.where(ends > starts, pl.cdiv(ends - aligned, HALF), 0)
    last = jnp.cumsum(counts)
    index = jnp.arange(rows // HALF + 2 * starts.size, dtype=jnp.int32)
    group = jnp.sum(last <= index[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, starts.size - 1)
    return last[-1:], group, aligned[group] + (index - last[group] + counts[group]) * HALF


def _store_rows(rows: Any, out: Any, begin: Any, to: Any, count: Any) -> None:
    """Copies some rows: a copy's size is static, so by powers of two."""
    size = HALF
    while size:

        @pl.when(count & size != 0)
        def _(begin: Any = begin, to: Any = to, size: int = size) -> None:
            plgpu.copy_smem_to_gmem(rows.at[pl.ds(begin, size)], out.at[pl.ds(to, size)])

        begin, to = begin + (count & size), to + (count & size)
        size //= 2


def _outer(
    lhs: Float[Array, "m k"], d_out: Float[Array, "m n"], group_sizes: Int[Array, "e"]
) -> Float[Array, "e k n"]:
    rows, inner = lhs.shape
    outer, groups, high = d_out.shape[1], group_sizes.shape[0], 2 * HALF
    down, across = pl.cdiv(inner, high), pl.cdiv(outer, HALF)
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    starts = ends - group_sizes.astype(jnp.int32)
    blocks = [
        hopper.block((STEP, high), lambda step: (step, 0), lhs.dtype),
        hopper.block((STEP, HALF), lambda step: (step, 0), d_out.dtype),
    ]

    def body(starts: Any, ends: Any, lhs: Any, d_out: Any, out: Any) -> None:
        def tile(index: Any, run: Run, scratch: Any) -> None:
            group, place = index // (down * across), index % (down * across)
            row, column = place // across * high, place % across * HALF
            start = pl.multiple_of(starts[group] // ROWS * ROWS, ROWS)
            begin, end = starts[group] - start, ends[group] - start

            def multiply(step: Any, left: Any, right: Any, total: Any) -> Any:
                left, done = left.at[:, hopper.my_half()], step[0] * STEP

                @pl.when((done < begin) | (end < done + STEP))
                def _() -> None:
                    at = hopper.indices((STEP, HALF), 0) + done
                    own = (at >= begin) & (at < end)
                    left[...] = jnp.where(own, left[...], jnp.zeros((), left.dtype))
                    plgpu.commit_smem()

                plgpu.wgmma(total, left.transpose((1, 0)), right)
                plgpu.wgmma_wait(0)
                return total

            def store(total: Any) -> None:
                half = jax.lax.axis_index("half")
                made = total[...].astype(out.dtype)
                to = out.at[group, pl.ds(row + half * HALF, HALF)]
                for part in range(0, HALF, STORED):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    scratch[half] = hopper.columns_of(made, part)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        scratch.at[half], to.at[:, pl.ds(column + part, STORED)]
                    )

            # A group without rows takes one step too, of zeros.
            steps = jnp.maximum(1, pl.cdiv(end, STEP))
            left, right = lhs.at[:, pl.ds(row, high)], d_out.at[:, pl.ds(column, HALF)]
            span = pl.ds(start, rows)
            run(multiply, store, steps, left.at[span], right.at[span])

        scratch = plgpu.SMEM((2, HALF, STORED), out.dtype, transforms=hopper.transforms(out.dtype))
        hopper.each_tile(tile, groups * down * across, blocks, (lhs, d_out), scratch)

    run = hopper.kernel(body, jax.ShapeDtypeStruct((groups, inner, outer), lhs.dtype))
    return run(starts, ends, lhs, d_out)


grouped_matmul = differentiable(_product, _outer)
"""Multiplies each group's rows with its matrix; other rows hold anything."""
