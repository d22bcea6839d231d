"""What matrix kernels for Hopper GPUs share, in Pallas.

A block of threads is three warpgroups: one copies operands to shared memory some steps ahead, two
multiply half a tile each. Blocks stay on their multiprocessor and take one tile after another, so
that the first operands of a tile are copied while the last tile's results are stored.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

HALF = 128
"""Both sides of what one warpgroup computes at a time."""
STEP = 64
"""How much of the contracted dimension is multiplied at a time: 128 bytes, as copies swizzle."""
STORED = 64
"""Columns that a warpgroup stores at a time."""
ROWS = 8
"""Copies begin at a multiple of so many rows."""

_STAGES = 4
"""Steps in shared memory; five do not fit."""
_MEMORY_REGISTERS = 40
_MULTIPROCESSORS = 132

# In kernels everything is a reference or a register: Any to the checker.
Multiply = Callable[[Any, Any, Any, Any], Any]
Store = Callable[[Any], None]
Run = Callable[..., None]


def kernel(body: Callable[..., None], out: jax.ShapeDtypeStruct) -> Callable[..., Array]:
    """A function of arrays that runs `body`, which is given references to them and to `out`."""
    made: Callable[..., Array] = plgpu.kernel(
        body,
        out_type=out,
        grid=(_MULTIPROCESSORS,),
        grid_names=("multiprocessor",),
        num_threads=3,
        thread_name="half",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return made


def each_tile(
    tile: Callable[[Any, Run, Any], None],
    count: Any,
    blocks: Sequence[Any],
    operands: Sequence[Any],
    scratch: Any,
) -> None:
    """Shares tiles out among the multiprocessors.

    Args:
        tile: Takes a tile's index, a function and the scratch. It calls the function once, with
            how to multiply a step's blocks, how to store the total, the number of steps, and the
            two operands of the tile.
        count: How many tiles there are.
        blocks: What is copied of each operand at a step, as `block` says.
        operands: Two references to matrices like those of a tile.
        scratch: Shared memory of both warpgroups for what they store.
    """

    def pipeline(multiply: Any, context: Any, steps: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(steps,),
            in_specs=list(blocks),
            max_concurrent_steps=_STAGES,
            memory_registers=_MEMORY_REGISTERS,
            wg_axis="half",
            num_compute_wgs=2,
            compute_context=context,
        )

    def nothing(*_: Any, **__: Any) -> None:
        return None

    # Outside the loop over tiles: a tile's copies begin before the last one's buffers are free.
    buffers = pipeline(nothing, nothing, _STAGES).get_allocations(*operands)

    @partial(pl.run_scoped, buffers=buffers, scratch=scratch, collective_axes="half")
    def _(buffers: Any, scratch: Any) -> None:
        @plgpu.nd_loop((count,), collective_axes="multiprocessor")
        def _(info: Any) -> None:
            def run(multiply: Multiply, store: Store, steps: Any, *operands: Any) -> None:
                accumulator: Any = plgpu.ACC((HALF, HALF), jnp.float32)  # type: ignore[attr-defined]

                def context(loop: Callable[[Any], Any]) -> None:
                    @partial(pl.run_scoped, total=accumulator)
                    def _(total: Any) -> None:
                        loop(total)
                        store(total)

                pipeline(multiply, context, steps)(*operands, allocations=buffers)

            tile(info.index[0], run, scratch)

        plgpu.wait_smem_to_gmem(0)


def block(shape: tuple[int, int], index: Callable[[Any], tuple[Any, Any]], dtype: Any) -> Any:
    """What is copied at a step: a block of such a shape, with such an index."""
    return plgpu.BlockSpec(shape, index, transforms=transforms(dtype), memory_space=plgpu.SMEM)


def transforms(dtype: Any) -> tuple[Any, Any]:
    """Shared memory as the matrix units read it: 8 rows of 128 bytes in a tile, swizzled."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return tiling, plgpu.SwizzleTransform(128)


def my_half() -> Any:
    """The part of a tile's longer side that this warpgroup works on."""
    return pl.ds(jax.lax.axis_index("half") * HALF, HALF)


def indices(shape: tuple[int, int], dimension: int) -> Int[Array, "a b"]:
    """An iota in the layout of what is accumulated."""
    return plgpu.layout_cast(
        jax.lax.broadcasted_iota(jnp.int32, shape, dimension), plgpu.Layout.WGMMA
    )


def columns_of(total: Float[Array, "a b"], part: int) -> Float[Array, "a c"]:
    """Those that are stored together, from `part` on."""
    return total[:, part : part + STORED]
