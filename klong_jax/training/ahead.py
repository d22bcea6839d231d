"""The programs of a training step, compiled from shapes alone before anything is trained.

They are the trainer's own, for the shapes and places that a run gives them: compiled for the
devices that are here, they are what the run then calls, and nothing is compiled again. Compiled for
devices that are not here, they tell what a run would take.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Generic, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp

from klong_jax.models.decoder import Params
from klong_jax.parallel.rules import array_sharding, placed, rounded_up
from klong_jax.training.accumulate import Trainer, TrainState
from klong_jax.training.batches import Layout, WindowBatch, pad_windows
from klong_jax.training.offload import HOST

StepName = Literal["whole", "read", "after", "back", "update"]
"""The gradient of whole windows; of a prefix that is computed once, its forward pass, a window
after it and its backward pass; the update of the parameters."""


class Placed(Protocol):
    """What became of a program."""

    @property
    def output_shardings(self) -> Any:
        """Where its results live; None if it was refused."""


C = TypeVar("C", bound=Placed)


@dataclass(frozen=True)
class StepProgram(Generic[C]):
    """A program of a training step.

    Attributes:
        name: Which one.
        compiled: What became of it.
        beside: Bytes that a device holds beside the program's arguments while it runs.
    """

    name: StepName
    compiled: C
    beside: int


def compile_step(
    trainer: Trainer,
    state: TrainState,
    layout: Layout,
    compiler: Callable[[Any], C],
) -> Iterator[StepProgram[C]]:
    """Compiles the programs of a step under the active mesh, one after another.

    Args:
        trainer: Takes the step.
        state: The shapes of its state.
        layout: The shapes of its micro-batches.
        compiler: Compiles what was lowered.

    Yields:
        Each program; what follows a refused forward pass of the prefix is left out.
    """
    windows = _abstract(layout.arrange((), ()), layout.rows)
    parts = trainer.selection.split(state.params)
    total = placed(jax.eval_shape(trainer.start, *parts, windows))
    kept = device_bytes((state.opt_state, state.step))
    if layout.whole or not any(layout.shared):
        lowered = trainer.accumulate.lower(*parts, total, windows)
        yield StepProgram("whole", compiler(lowered), kept)
    for shared in filter(None, layout.shared):
        yield from _shared(trainer, parts, total, layout, shared, kept, compiler)
    scale = _shape((), jnp.float32)
    learnt, frozen = parts
    lowered = trainer.update.lower(replace(state, params=learnt), total[0], scale)
    yield StepProgram("update", compiler(lowered), device_bytes(frozen))


def _shared(
    trainer: Trainer,
    parts: tuple[Params, Params],
    total: Any,
    layout: Layout,
    length: int,
    kept: int,
    compiler: Callable[[Any], C],
) -> Iterator[StepProgram[C]]:
    shared = trainer.shared
    prefix = _abstract(pad_windows((), (), length), layout.rows)
    window = _abstract(pad_windows((), (), layout.length - length), layout.rows)
    lowered = shared.read.lower(*parts, prefix, trained=layout.trained)
    read = compiler(lowered)
    yield StepProgram("read", read, kept + device_bytes(total))
    if read.output_shardings is None:
        return
    # Where the compiler puts what the backward pass needs is where the other programs find it.
    given = jax.tree.map(
        lambda info, where: _shape(info.shape, info.dtype, where),
        lowered.out_info,
        read.output_shardings,
    )
    before, wanted, logs, backward = given
    lowered = shared.after.lower(*parts, before, wanted, total, window)
    yield StepProgram("after", compiler(lowered), kept + device_bytes(backward))
    lowered = shared.back.lower(*parts, backward, before, wanted, total, logs)
    # The state of the prefix only says dtypes there, so it is no argument of what is compiled.
    yield StepProgram("back", compiler(lowered), kept + device_bytes(before))


def _abstract(batch: WindowBatch, rows: int) -> WindowBatch:
    """The shapes of a micro-batch of so many rows like these, and where they live on the mesh."""
    rows = rounded_up(rows, "batch")

    def shape(value: Any) -> Any:
        whole = (rows, *value.shape[1:])
        where = array_sharding(whole, ("batch", "length")[: value.ndim])
        return _shape(whole, value.dtype, where)

    shapes: WindowBatch = jax.tree.map(shape, batch)
    return shapes


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes or arrays in the memory of one device."""
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != HOST]
    return sum(prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _shape(shape: tuple[int, ...], dtype: Any, where: Any = None) -> Any:
    make: Any = jax.ShapeDtypeStruct
    return make(shape, dtype, sharding=where)
