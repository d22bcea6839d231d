"""`klong aot`: compiles programs for TPUs that are not here and says whether they fit.

The compiler is the TPU's own (libtpu), the programs are those of training and serving, and the
report is of one device: what the program holds, what it sends, and the least time it can take.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from klong_jax.core.errors import UserError
from klong_jax.kernels.backend import use_kernels
from klong_jax.models.cost import parameters
from klong_jax.models.presets import preset
from klong_jax.parallel.hlo import sent_by_axes
from klong_jax.parallel.mesh import make_mesh
from klong_jax.parallel.roofline import Bound, bound
from klong_jax.parallel.rules import SERVING, TRAINING, use_mesh
from klong_jax.parallel.topology import Topology, family, parse_topology
from klong_jax.pipelines.config.pods import AotConfig
from klong_jax.pipelines.programs import Compiled, Plan, compile_programs
from klong_jax.training.optimizer import OptimizerConfig

_GIB = 2**30


@dataclass(frozen=True)
class Result:
    """A compiled program and what is known of it.

    Attributes:
        made: The program.
        bound: The least time it can take.
        capacity: Bytes of a device's memory.
    """

    made: Compiled
    bound: Bound
    capacity: int

    @property
    def peak(self) -> int:
        """Bytes on a device while the program runs."""
        return self.made.program.memory.total + self.made.resident

    @property
    def fits(self) -> bool:
        """Whether they suffice."""
        return not self.made.program.refused and self.peak <= self.capacity


def run(config: AotConfig) -> None:
    """Compiles, prints, and exits with 1 if it does not fit."""
    # The TPU compiler is asked directly; a TPU that is attached is left alone.
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    topology = parse_topology(config.topology)
    if config.fit == "smallest":
        fitting = _smallest(console, config, topology)
        if fitting is None:
            console.print(f"no {topology.chip.name} slice fits")
            raise SystemExit(1)
        console.print(f"the smallest {topology.chip.name} slice that fits is {fitting}")
        return
    results = compile_for(config, topology)
    _print(console, config, topology, results)
    if not all(result.fits for result in results):
        raise SystemExit(1)


def compile_for(config: AotConfig, topology: Topology) -> list[Result]:
    """Compiles the programs of a step for a topology.

    Raises:
        UserError: The mesh does not fill the topology or does not divide the model.
    """
    shape = config.mesh.shape(topology.chips)
    mesh = make_mesh(shape, topology.devices())
    places = shape.data * shape.fsdp * shape.expert
    plan = Plan(
        model=preset(config.model),
        mesh=shape,
        rows=config.rows or places,
        prefix=config.prefix,
        window=config.window,
        shared=config.shared_prefix,
        together=config.together,
        remat=config.remat,
        optimizer=OptimizerConfig(config.optimizer),
        chunk=config.chunk,
        decode_steps=config.decode_steps,
    )
    rules = TRAINING if config.step in ("sft", "rl") else SERVING
    results = []
    with use_mesh(mesh, rules), use_kernels("tpu", **config.kernels.chosen()):
        for made in compile_programs(config.step, plan):
            work = replace(made.work, sent=sent_by_axes(made.program.collectives))
            results.append(Result(made, bound(work, topology, mesh), topology.chip.hbm_bytes))
    return results


def _smallest(console: Console, config: AotConfig, given: Topology) -> Topology | None:
    for topology in family(given.chip):
        try:
            results = compile_for(config, topology)
        except UserError as error:
            console.print(f"{topology}: {error}", style="dim", markup=False)
            continue
        peak = max(result.peak for result in results)
        console.print(
            f"{topology}: {peak / _GIB:.1f} GiB of {given.chip.hbm_bytes / _GIB:.1f} a device",
            markup=False,
        )
        if all(result.fits for result in results):
            return topology
    return None


def _print(console: Console, config: AotConfig, topology: Topology, results: list[Result]) -> None:
    shape = config.mesh.shape(topology.chips)
    console.print(
        f"{config.model}: {parameters(preset(config.model)) / 1e9:.1f} billion parameters; "
        f"{config.step} on {topology}, {topology.chips} chips: {shape}",
        markup=False,
    )
    for result in results:
        table = Table("", "", title=result.made.name, show_header=False)
        for name, value in _rows(result):
            table.add_row(name, value)
        console.print(table)
        if not result.fits:
            said = result.made.program.refused or "it takes more memory than a device has"
            console.print(f"does not fit: {said}", style="red", markup=False)
        if not result.fits or config.buffers:
            _print_buffers(console, result)
    if config.shared_prefix and all(result.fits for result in results):
        _print_sharing(console, config, results)


def _print_sharing(console: Console, config: AotConfig, results: list[Result]) -> None:
    """Compares the windows of a trajectory, computed whole and with their prefix once."""
    table = Table(
        f"{config.together} windows of a trajectory in every row",
        "peak a device",
        "least time",
        "MFU at most",
        "one after another",
    )
    ways = {
        "computed whole": [(result, result.made.whole) for result in results],
        f"{config.shared_prefix} tokens once": [(result, result.made.once) for result in results],
    }
    for name, runs in ways.items():
        used = [(result, times) for result, times in runs if times]
        seconds = sum(times * result.bound.seconds for result, times in used)
        serial = sum(times * result.bound.serial for result, times in used)
        useful = sum(times * result.bound.useful for result, times in used)
        table.add_row(
            name,
            _gib(max(result.peak for result, _ in used)),
            _time(seconds),
            f"{useful / seconds:.0%}",
            f"{_time(serial)}, {useful / serial:.0%}",
        )
    console.print(table)


def _rows(result: Result) -> list[tuple[str, str]]:
    program, work, limits = result.made.program, result.made.work, result.bound
    memory = program.memory
    rows = [
        ("arguments", _gib(memory.arguments)),
        ("results", _gib(memory.outputs)),
        ("temporaries", _gib(memory.temporaries)),
        ("program", _gib(memory.code)),
        ("state beside it", _gib(result.made.resident)),
        ("peak", f"{_gib(result.peak)} of {_gib(result.capacity)} a device"),
        (
            "arithmetic",
            f"{_tera(work.flops)} TFLOP, {_tera(work.model_flops)} without remat",
        ),
        ("memory traffic", f"{work.hbm_bytes / 1e9:.4g} GB at least"),
    ]
    sent = sent_by_axes(program.collectives)
    rows += [(f"sent over {axes}", f"{size / 1e9:.4g} GB") for axes, size in sent.items()]
    links = sum(limits.links.values())
    rows += [
        ("time of compute", _time(limits.compute)),
        ("time of memory", _time(limits.memory)),
        ("time of links", _time(links)),
        ("least time", f"{_time(limits.seconds)}, set by {limits.limit}"),
        ("MFU at most", f"{limits.mfu:.0%} overlapped, {limits.mfu_serial:.0%} one after another"),
        ("compiled in", f"{program.seconds:.0f} s"),
    ]
    return rows


def _print_buffers(console: Console, result: Result) -> None:
    table = Table("size", "holds", "made by", title="largest buffers")
    for buffer in result.made.program.memory.largest:
        table.add_row(_gib(buffer.size), _short(buffer.holds, 60), _short(buffer.made_by, 60))
    console.print(table)


def _gib(size: float) -> str:
    gib = size / _GIB
    return f"{gib:.2f} GiB" if gib > 0.1 else f"{gib:.2g} GiB"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.4g}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _short(text: str, width: int) -> Any:
    return text if len(text) <= width else f"{text[: width // 2]}...{text[-width // 2 :]}"
