"""A process of the sharding tests: a step's loss and gradients on meshes, against one device's.

Arguments: a JSON object with `cases` ([model, mesh, tokens of a shared prefix or
"packed"]), and `save` or
`restore` (a folder and a mesh) for checkpoints. Prints a JSON object a line.
"""

import hashlib
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from klong_jax.core.trajectory import Window
from klong_jax.models.config import DecoderConfig, DTypes, LoraConfig, MoeConfig
from klong_jax.models.decoder import build
from klong_jax.models.lora import ADAPTERS, adapt
from klong_jax.parallel.distributed import start_processes
from klong_jax.parallel.mesh import MeshShape, make_mesh
from klong_jax.parallel.rules import param_shardings, spread, use_mesh
from klong_jax.sft.loss import sft_loss
from klong_jax.training.accumulate import Trainer, TrainState, abstract_state, init_state
from klong_jax.training.batches import Layout, WindowBatch, lay_out
from klong_jax.training.checkpoint import Checkpoints
from klong_jax.training.frozen import EVERYTHING, Selection, joined
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer

MODELS = {
    "dense": DecoderConfig(64, 32, 2, 4, 2, 8, 64),
    "adapted": DecoderConfig(64, 32, 2, 4, 2, 8, 64),
    "mixture": DecoderConfig(
        64,
        32,
        2,
        4,
        2,
        8,
        64,
        tie_embeddings=False,
        attention_bias=True,
        moe=MoeConfig(8, 2, 16, "sigmoid", shared_size=16, dense_layers=1, router_bias=True),
    ),
}
LORA = LoraConfig(3, 6.0, ("query", "key", "value", "output", "gate", "up", "down"))
OPTIMIZER = make_optimizer(OptimizerConfig("muon", 1e-2))


def make_batch(rows: int = 8, length: int = 32) -> WindowBatch:
    rng = np.random.default_rng(0)
    trained = (rng.random((rows, length)) < 0.5).astype(np.float32)
    zeros = np.zeros((rows, length), np.float32)
    tokens = rng.integers(0, 64, (rows, length)).astype(np.int32)
    return WindowBatch(tokens, trained, zeros, zeros, np.linspace(0.5, 2, rows, dtype=np.float32))


def make_groups() -> list[tuple[Window, ...]]:
    """Windows of twelve trajectories of one to four windows, that begin with 16 common tokens."""
    rng = np.random.default_rng(1)

    def window(index: int, prefix: np.ndarray, length: int) -> Window:
        tokens = np.r_[prefix, rng.integers(0, 64, length - 16)].astype(np.int32)
        trained = (rng.random(length) < 0.5) & ((np.arange(length) >= 16) | (index == 0))
        return Window(index, 16, tokens, trained, np.zeros(length), np.zeros(length), length)

    groups = []
    for count in (1, 2, 3, 4) * 3:
        prefix = rng.integers(0, 64, 16)
        groups.append(
            tuple(window(index, prefix, int(rng.integers(20, 49))) for index in range(count))
        )
    return groups


@cache
def built(model: str) -> tuple[Any, Any]:
    """The decoder, made outside of any mesh; "adapted" has adapters that give something."""
    graph, params = build(MODELS[model], 0)
    if model != "adapted":
        return graph, params
    graph, params = adapt(graph, params, LORA, DTypes(), 0)
    fresh, base = Selection(learnt=ADAPTERS).split(params)
    return graph, joined(base, jax.tree.map(lambda leaf: leaf + 0.01, fresh))


def layout(shared: int | str) -> Layout:
    return Layout(96, 8, pack=True) if shared == "packed" else Layout(48, 8, (int(shared),))


def gradients(model: str, shared: int | str | None) -> tuple[Any, dict[str, Any]]:
    """Under the active mesh, or on one device without one; of groups if `shared` is not None."""
    graph, params = built(model)
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        params = jax.tree.map(spread, params, param_shardings(params, mesh))
    selection = Selection(learnt=ADAPTERS) if model == "adapted" else EVERYTHING
    trainer = Trainer(sft_loss(graph, remat="full"), OPTIMIZER, selection=selection)
    batches: list[Any] = [make_batch()]
    if shared is not None:
        groups = make_groups()
        batches = list(lay_out(groups, [0.5] * len(groups), layout(shared)))
    total = None
    for batch in batches:
        total = trainer.add(params, total, batch)
    return total


@cache
def alone(model: str, grouped: bool) -> tuple[list[np.ndarray], float]:
    """Gradients and loss of whole windows on one device."""
    grads, logs = gradients(model, 0 if grouped else None)
    return whole(grads), float(logs["loss"])


def whole(tree: Any) -> list[np.ndarray]:
    """Every leaf in full, whatever process its parts are in."""
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        everywhere = NamedSharding(mesh, PartitionSpec())
        tree = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def compare(model: str, shape: MeshShape, shared: int | str | None = None) -> dict[str, Any]:
    expected, loss = alone(model, shared is not None)
    with use_mesh(make_mesh(shape)):
        sharded, logs = gradients(model, shared)
        found = whole(sharded)
    off = [
        float(np.abs(a - b).max() / (np.abs(b).max() + 1e-6))
        for a, b in zip(found, expected, strict=True)
    ]
    return {
        "model": model,
        "shared": shared,
        "mesh": str(shape),
        "processes": jax.process_count(),
        "loss": float(logs["loss"]),
        "alone": loss,
        "off": max(off),
        "norms": [float(np.linalg.norm(leaf)) for leaf in found],
    }


def stepped(shape: MeshShape) -> TrainState:
    """A state after one optimiser step on a mesh."""
    graph, params = built("mixture")
    shardings = param_shardings(params, make_mesh(shape))
    state = init_state(jax.tree.map(spread, params, shardings), OPTIMIZER)
    trainer = Trainer(sft_loss(graph, remat="full"), OPTIMIZER)
    return trainer.step(state, [make_batch()], 100.0)[0]


def digest(state: TrainState) -> str:
    held = hashlib.sha256()
    for leaf in whole(state):
        held.update(leaf.tobytes())
    return held.hexdigest()


def save(folder: str, shape: MeshShape) -> dict[str, Any]:
    built("mixture")
    with use_mesh(make_mesh(shape)):
        state = stepped(shape)
        checkpoints = Checkpoints(Path(folder), {"model": "m"})
        checkpoints.save(state, {"position": 7})
        checkpoints.close()
        return {"mesh": str(shape), "digest": digest(state)}


def restore(folder: str, shape: MeshShape) -> dict[str, Any]:
    _, params = built("mixture")
    with use_mesh(make_mesh(shape)):
        like = abstract_state(params, OPTIMIZER)
        checkpoints = Checkpoints(Path(folder), {"model": "m"})
        state, progress = checkpoints.restore(like)
        checkpoints.close()
        wanted = jax.tree.map(lambda leaf: leaf.sharding, like)
        placed = jax.tree.map(lambda leaf, where: leaf.sharding == where, state, wanted)
        return {
            "mesh": str(shape),
            "digest": digest(state),
            "position": progress["position"],
            "in_place": all(jax.tree.leaves(placed)),
        }


def main() -> None:
    start_processes()
    jax.config.update("jax_default_matmul_precision", "highest")
    asked = json.loads(sys.argv[1])
    for model, mesh, shared in asked.get("cases", ()):
        print(json.dumps(compare(model, MeshShape(**mesh), shared)), flush=True)
    for name, action in (("save", save), ("restore", restore)):
        if name in asked:
            folder, mesh = asked[name]
            print(json.dumps(action(folder, MeshShape(**mesh))), flush=True)


if __name__ == "__main__":
    main()
