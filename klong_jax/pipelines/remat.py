"""`remat=auto`: the policy of rematerialisation that repeats least and fits into memory.

The compiler is asked, policy by policy, until a training step fits. What it compiles is what the
run then calls, so the choice costs the compiling of what does not fit. It may change the last bits
of a result, so a run keeps to it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from rich.console import Console

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import read_json, write_json
from klong_jax.models.config import DecoderConfig, DType, Remat
from klong_jax.models.cost import kept_numbers
from klong_jax.parallel.aot import exhausted
from klong_jax.parallel.distributed import any_process, from_first, is_first, together
from klong_jax.parallel.memory import free_memory
from klong_jax.parallel.rules import rounded_up
from klong_jax.training.accumulate import Trainer, TrainState
from klong_jax.training.ahead import StepProgram, compile_step, device_bytes
from klong_jax.training.batches import Layout

_GIB = 2**30
_FILE = "remat.json"
# Allocators lose some to fragmentation.
_USABLE = 0.95


@dataclass(frozen=True)
class Step:
    """A training step that is to fit.

    Attributes:
        trainer: Makes what takes it, under a policy.
        model: The decoder's numbers.
        compute: The dtype of what layers keep.
        state: The shapes of what it changes, which is not there yet.
        layouts: The shapes of its micro-batches.
        beside: Bytes on a device of what else will be there by then, less what of the step is there
            already.
    """

    trainer: Callable[[Remat], Trainer]
    model: DecoderConfig
    compute: DType
    state: TrainState
    layouts: Sequence[Layout]
    beside: int = 0


def fitting_trainer(
    asked: Remat | Literal["auto"], step: Step, folder: Path, console: Console
) -> Trainer:
    """The trainer of a step under the policy that is asked for; under auto, one that fits.

    All processes take the same policy: one for which the step fits everywhere. It is written to
    the folder, and taken from there if the same devices go on.

    Raises:
        UserError: The step fits under no policy.
    """
    if asked != "auto":
        return step.trainer(asked)
    file = folder / _FILE
    here = {"device": jax.devices()[0].device_kind, "mesh": dict(jax.sharding.get_mesh().shape)}
    known = from_first(lambda: read_json(file) if file.exists() else {})
    if known.get("on") == here:
        remat: Remat = known["remat"]
        console.print(f"remat={remat}, as when the run began", markup=False)
        return step.trainer(remat)
    remat, trainer, why = _choose(step)
    console.print(why, markup=False)
    if is_first():
        write_json(file, {"remat": remat, "why": why, "on": here})
    return trainer


def _choose(step: Step) -> tuple[Remat, Trainer, str]:
    """The policy, its trainer, and a line that says why."""
    free = free_memory()
    if any_process(free is None):
        why = "remat=full: how much memory a device has is not known"
        return "full", step.trainer("full"), why
    assert free is not None
    usable = int(_USABLE * free)
    said, started = list[str](), time.monotonic()
    remat: Remat
    for remat in get_args(Remat):
        least, begun = least_bytes(step, remat), time.monotonic()
        if any_process(least > usable):
            said.append(f"{remat} needs at least {_gib(least)}")
            continue
        trainer = step.trainer(remat)
        needed = together(partial(needed_bytes, step, trainer))
        said.append(f"{remat} needs {_gib(needed)}" if needed else f"the compiler refuses {remat}")
        if any_process(needed is None or needed > usable):
            continue
        cost = f"compiled in {time.monotonic() - begun:.0f} s"
        if len(said) > 1:
            cost += f" after {begun - started:.0f} s for what does not fit"
        return remat, trainer, f"remat={remat}: {_listed(said, usable)} ({cost})"
    raise UserError(
        f"remat=auto: a training step fits under no policy ({_listed(said, usable)}); make "
        "micro_batch or splitting.context_limit smaller or spread it over more devices with "
        "mesh.*, or set remat=full to try all the same."
    )


def least_bytes(step: Step, remat: Remat) -> int:
    """Bytes of a device that a step takes at least: state, gradients, and what layers keep.

    What layers keep less if a part of the parameters is frozen depends on the part.
    """
    devices = jax.sharding.get_mesh().size or 1
    tokens = max(rounded_up(layout.rows, "batch") * layout.length for layout in step.layouts)
    kept = tokens * kept_numbers(step.model, remat) * jnp.dtype(step.compute).itemsize
    learnt, frozen = step.trainer(remat).selection.split(step.state.params)
    if jax.tree.leaves(frozen):
        kept = 0
    return step.beside + device_bytes((step.state, learnt)) + kept // devices


def needed_bytes(step: Step, trainer: Trainer) -> int | None:
    """Bytes of a device that a step takes, as the compiler says; None if it refuses."""
    most = 0
    for layout in step.layouts:
        try:
            programs = compile_step(trainer, step.state, layout, lambda lowered: lowered.compile())
            most = max(most, *map(_peak, programs))
        except JaxRuntimeError as error:
            if not exhausted(error):
                raise
            return None
    return step.beside + most


def _peak(program: StepProgram[Any]) -> int:
    memory = program.compiled.memory_analysis()
    return int(
        program.beside
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def _listed(said: Sequence[str], usable: int) -> str:
    """What policies need of what there is."""
    return f"{', '.join(said)} of {_gib(usable)} a device, {_USABLE:.0%} of what is free"


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
