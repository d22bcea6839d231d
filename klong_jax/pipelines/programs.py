"""The programs of training and serving, compiled for a mesh from shapes alone.

They are the ones that run: the trainer's, with its optimiser state, and the engine's. Nothing is
allocated, so the mesh may be of devices that are not here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from klong_jax.engine.programs import CACHE_DIMENSIONS, Rows
from klong_jax.engine.programs import compile_programs as engine_programs
from klong_jax.models.config import DecoderConfig, DTypes, Remat
from klong_jax.models.cost import (
    cache_numbers,
    forward_flops,
    parameters,
    repeated_flops,
    stream_bytes,
)
from klong_jax.models.decoder import abstract, empty_cache
from klong_jax.parallel.aot import Program, compile_ahead
from klong_jax.parallel.mesh import MeshShape
from klong_jax.parallel.roofline import Work
from klong_jax.parallel.rules import array_sharding, placed
from klong_jax.rl.loss import RlLossConfig, rl_loss
from klong_jax.sft.loss import sft_loss
from klong_jax.training.accumulate import Trainer, abstract_state
from klong_jax.training.ahead import StepName, compile_step, device_bytes
from klong_jax.training.batches import Layout
from klong_jax.training.loss import WindowLoss
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer

Step = Literal["sft", "rl", "prefill", "decode"]
"""A training step, or a call of the engine with a full cache."""

_BF16, _FLOAT32 = 2, 4


@dataclass(frozen=True)
class Plan:
    """What is to run, and on how much.

    Attributes:
        model: The decoder's numbers.
        mesh: Sizes of the mesh's axes.
        rows: Windows of a micro-batch, or sequences that are served.
        prefix: Tokens of the pinned prefix.
        window: Tokens after it.
        shared: Tokens of it that are computed once for all windows of a trajectory.
        together: How many windows that is.
        remat: What a layer keeps for its backward pass.
        optimizer: How parameters are updated.
        chunk: Prompt tokens a row and prefill call.
        decode_steps: Tokens sampled a call.
    """

    model: DecoderConfig
    mesh: MeshShape
    rows: int
    prefix: int
    window: int
    shared: int
    together: int
    remat: Remat
    optimizer: OptimizerConfig
    chunk: int
    decode_steps: int

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prefix + self.window


@dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
        name: What it does.
        program: What the compiler said.
        resident: Bytes that a device holds beside the program's arguments while it runs.
        work: What one device does, but for what it sends.
        whole: How often it runs for a trajectory in every row whose windows are computed whole.
        once: The same with the prefix computed once.
    """

    name: str
    program: Program
    resident: int
    work: Work
    whole: int = 0
    once: int = 0


def compile_programs(step: Step, plan: Plan) -> Iterator[Compiled]:
    """Compiles the programs of a step under the active mesh, one after another.

    Raises:
        UserError: The mesh does not divide an array.
    """
    match step:
        case "sft":
            return _training(plan, lambda graph: sft_loss(graph, remat=plan.remat))
        case "rl":
            loss = partial(rl_loss, config=RlLossConfig(), remat=plan.remat)
            return _training(plan, loss)
        case "prefill":
            return _prefill(plan)
        case "decode":
            return _decode(plan)


def _compile(lowered: Any) -> Program:
    return compile_ahead(lowered, jax.sharding.get_mesh().shape)


def _training(plan: Plan, loss: Callable[[Any], WindowLoss]) -> Iterator[Compiled]:
    graph, params = abstract(plan.model, DTypes("float32", "bfloat16"))
    optimizer = make_optimizer(plan.optimizer)
    selection = plan.optimizer.selection
    state = abstract_state(params, optimizer, selection)
    learnt, _ = selection.split(state.params)
    own = replace(state, params=learnt)
    layout = Layout(plan.length, plan.rows, (plan.shared,))
    trainer = Trainer(loss(graph), optimizer, selection=selection)
    for made in compile_step(trainer, state, layout, _compile):
        title, whole, once = _STEPS[made.name]
        if made.name == "update":
            # Gradient and three arrays of the state are read, the three are written.
            work = Work(0.0, 0.0, device_bytes((own, own, learnt)), {})
        else:
            work = _gradient_work(plan, made.name)
        runs = [plan.together if runs == "windows" else runs for runs in (whole, once)]
        yield Compiled(title, made.compiled, made.beside, work, *runs)


# Names for people, and how often each runs for the windows of a trajectory, computed whole and with
# their prefix computed once.
_STEPS: dict[StepName, tuple[str, int | Literal["windows"], int | Literal["windows"]]] = {
    "whole": ("gradients of a micro-batch", "windows", 0),
    "read": ("the prefix forward", 0, 1),
    "after": ("gradients of windows after the prefix", 0, "windows"),
    "back": ("the prefix backward", 0, 1),
    "update": ("update of the parameters", 0, 0),
}


def _gradient_work(plan: Plan, name: StepName) -> Work:
    model, chips = plan.model, plan.mesh.devices
    own, before = {
        "whole": (plan.length, 0),
        "after": (plan.length - plan.shared, plan.shared),
    }.get(name, (plan.shared, 0))
    forward = forward_flops(model, plan.rows, own, before, own)
    repeated = repeated_flops(model, plan.remat, plan.rows, own, before)
    # Of three passes' worth of work reading does one, and going back the rest with what repeats.
    passes = {"read": 1, "back": 2}.get(name, 3)
    if name == "read":
        repeated = 0.0
    sweeps = passes + (name != "read" and plan.remat in ("attention", "full"))
    streamed = plan.rows * own / chips * stream_bytes(model, _BF16)
    streamed += plan.rows * before / chips * 2 * cache_numbers(model) * _BF16
    hbm = sweeps * (2 * _weights_on_device(plan, _BF16) + streamed)
    if name != "read":
        hbm += 2 * _FLOAT32 * parameters(model) / chips
    return Work(passes * forward / chips, (passes * forward + repeated) / chips, hbm, {})


def _prefill(plan: Plan) -> Iterator[Compiled]:
    params, cache, prefill, _ = _serving(plan)
    positions = _array((plan.rows, plan.chunk), jnp.int32)
    before = plan.length - plan.chunk
    flops = forward_flops(plan.model, plan.rows, plan.chunk, before, 0) / plan.mesh.devices
    tokens = plan.rows * plan.chunk / plan.mesh.devices
    hbm = _weights_on_device(plan, _BF16) + device_bytes(cache)
    hbm += tokens * stream_bytes(plan.model, _BF16)
    program = _compile(prefill.lower(params, cache, positions, positions))
    yield Compiled("prefill of a full cache", program, 0, Work(flops, flops, hbm, {}))


def _decode(plan: Plan) -> Iterator[Compiled]:
    params, cache, _, sample = _serving(plan)
    number = _array((plan.rows,), jnp.int32)
    key = _array((plan.rows, 2), jnp.uint32)
    each = forward_flops(plan.model, plan.rows, 1, plan.length - 1, 1) / plan.mesh.devices
    flops = plan.decode_steps * each
    hbm = plan.decode_steps * (_weights_on_device(plan, _BF16) + device_bytes(cache))
    program = _compile(sample.lower(params, cache, Rows(number, number, number, key, number)))
    name = f"decoding of {plan.decode_steps} tokens"
    yield Compiled(name, program, 0, Work(flops, flops, hbm, {}))


def _serving(plan: Plan) -> tuple[Any, Any, Any, Any]:
    dtypes = DTypes("bfloat16", "bfloat16")
    graph, params = abstract(plan.model, dtypes)
    shapes = jax.eval_shape(lambda: empty_cache(plan.model, plan.rows, plan.length, dtypes))
    cache = jax.tree.map(lambda x: _array(x.shape, x.dtype, CACHE_DIMENSIONS, "the cache"), shapes)
    prefill, sample = engine_programs(graph, end_id=0, temperature=1.0, steps=plan.decode_steps)
    return placed(params), cache, prefill, sample


def _weights_on_device(plan: Plan, itemsize: int) -> float:
    """Bytes of all weights as a device sees them while it works: cut by tensor and expert only."""
    total = parameters(plan.model)
    experts = 0
    if moe := plan.model.moe:
        layers = plan.model.num_layers - plan.model.dense_layers
        experts = layers * 3 * moe.num_experts * plan.model.hidden_size * moe.expert_size
    rest = total - experts + experts / plan.mesh.expert
    return itemsize * rest / plan.mesh.tensor


def _array(
    shape: tuple[int, ...],
    dtype: Any,
    names: tuple[str | None, ...] = ("batch", "length"),
    what: str = "a batch",
) -> Any:
    where = array_sharding(shape, names[: len(shape)], what)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
