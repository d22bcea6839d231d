"""The programs of training and serving, lowered for a mesh from shapes alone.

They are the ones that run: the trainer's, with its optimiser state, and the engine's. Nothing is
allocated, so the mesh may be of devices that are not here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from klong_jax.engine.programs import CACHE_DIMENSIONS, Rows, compile_programs
from klong_jax.models.config import DecoderConfig, DTypes, Remat
from klong_jax.models.cost import (
    forward_flops,
    layer_matrices,
    parameters,
    stream_bytes,
)
from klong_jax.models.decoder import abstract, empty_cache
from klong_jax.parallel.mesh import MeshShape
from klong_jax.parallel.roofline import Work
from klong_jax.parallel.rules import array_sharding, placed
from klong_jax.rl.loss import RlLossConfig, rl_loss
from klong_jax.sft.loss import sft_loss
from klong_jax.training.accumulate import Trainer, abstract_state
from klong_jax.training.batches import WindowBatch
from klong_jax.training.loss import WindowLoss
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer

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
    remat: Remat
    optimizer: OptimizerConfig
    chunk: int
    decode_steps: int

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prefix + self.window


@dataclass(frozen=True)
class Lowered:
    """A program, ready to be compiled.

    Attributes:
        name: What it does.
        program: The lowered program.
        resident: Bytes that a device holds beside the program's arguments while it runs.
        work: What one device does, but for what it sends.
    """

    name: str
    program: Any
    resident: int
    work: Work


def lower_programs(step: str, plan: Plan) -> list[Lowered]:
    """Lowers the programs of "sft", "rl", "prefill" or "decode" under the active mesh."""
    return {"sft": _sft, "rl": _rl, "prefill": _prefill, "decode": _decode}[step](plan)


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _sft(plan: Plan) -> list[Lowered]:
    return _training(plan, lambda graph: sft_loss(graph, remat=plan.remat))


def _rl(plan: Plan) -> list[Lowered]:
    return _training(plan, lambda graph: rl_loss(graph, RlLossConfig(), remat=plan.remat))


def _training(plan: Plan, loss: Callable[[Any], WindowLoss]) -> list[Lowered]:
    graph, params = abstract(plan.model, DTypes("float32", "bfloat16"))
    optimizer = make_optimizer(plan.optimizer)
    selection = plan.optimizer.selection
    state = abstract_state(params, optimizer, selection)
    trainer = Trainer(loss(graph), optimizer, selection=selection)
    learnt, frozen = selection.split(state.params)
    row = _array((plan.rows, plan.length), jnp.float32)
    tokens = _array((plan.rows, plan.length), jnp.int32)
    batch = WindowBatch(tokens, row, row, row, _array((plan.rows,), jnp.float32))
    total = placed(jax.eval_shape(trainer.start, learnt, frozen, batch))
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    return [
        Lowered(
            "gradients of a micro-batch",
            trainer.accumulate.lower(learnt, frozen, total, batch),
            device_bytes(state.opt_state),
            _gradient_work(plan),
        ),
        Lowered(
            "update of the parameters",
            trainer.update.lower(replace(state, params=learnt), total[0], scale),
            device_bytes(frozen),
            # Gradient and three arrays of the state are read, the three are written.
            Work(0.0, 0.0, device_bytes((learnt, state.opt_state) * 2 + (total[0],)), {}),
        ),
    ]


def _gradient_work(plan: Plan) -> Work:
    model, chips = plan.model, plan.mesh.devices
    whole = forward_flops(model, plan.rows, plan.length, 0, plan.length)
    layers = forward_flops(model, plan.rows, plan.length, 0, 0)
    again = {"none": 0.0, "dots": 0.0, "full": layers}
    matrices = 2.0 * plan.rows * plan.length * layer_matrices(model, active=True)
    repeated = again.get(plan.remat, matrices)
    passes = 3 if plan.remat in ("none", "dots") else 4
    tokens = plan.rows * plan.length / chips
    gathered = _weights_on_device(plan, _BF16)
    streamed = tokens * stream_bytes(model, _BF16)
    hbm = passes * (2 * gathered + streamed) + 2 * _FLOAT32 * parameters(model) / chips
    return Work(3 * whole / chips, (3 * whole + repeated) / chips, hbm, {})


def _prefill(plan: Plan) -> list[Lowered]:
    params, cache, prefill, _ = _serving(plan)
    positions = _array((plan.rows, plan.chunk), jnp.int32)
    before = plan.length - plan.chunk
    flops = forward_flops(plan.model, plan.rows, plan.chunk, before, 0) / plan.mesh.devices
    tokens = plan.rows * plan.chunk / plan.mesh.devices
    hbm = _weights_on_device(plan, _BF16) + device_bytes(cache)
    hbm += tokens * stream_bytes(plan.model, _BF16)
    program = prefill.lower(params, cache, positions, positions)
    return [Lowered("prefill of a full cache", program, 0, Work(flops, flops, hbm, {}))]


def _decode(plan: Plan) -> list[Lowered]:
    params, cache, _, sample = _serving(plan)
    number = _array((plan.rows,), jnp.int32)
    key = _array((plan.rows, 2), jnp.uint32)
    each = forward_flops(plan.model, plan.rows, 1, plan.length - 1, 1) / plan.mesh.devices
    flops = plan.decode_steps * each
    hbm = plan.decode_steps * (_weights_on_device(plan, _BF16) + device_bytes(cache))
    program = sample.lower(params, cache, Rows(number, number, number, key, number))
    name = f"decoding of {plan.decode_steps} tokens"
    return [Lowered(name, program, 0, Work(flops, flops, hbm, {}))]


def _serving(plan: Plan) -> tuple[Any, Any, Any, Any]:
    dtypes = DTypes("bfloat16", "bfloat16")
    graph, params = abstract(plan.model, dtypes)
    shapes = jax.eval_shape(lambda: empty_cache(plan.model, plan.rows, plan.length, dtypes))
    cache = jax.tree.map(lambda x: _array(x.shape, x.dtype, CACHE_DIMENSIONS, "the cache"), shapes)
    prefill, sample = compile_programs(graph, end_id=0, temperature=1.0, steps=plan.decode_steps)
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
