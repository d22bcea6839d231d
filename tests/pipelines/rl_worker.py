"""A process of the RL test: `klong rl`'s training on meshes, with rollouts that are made up.

Arguments: a folder, "--process COORDINATOR INDEX" for one of two processes, and meshes as JSON,
with the tokens of a prefix that windows share as "shared".
"""

import asyncio
import json
import sys
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from hydra import compose, initialize_config_dir
from rich.console import Console

from klong_jax.core.message import Message
from klong_jax.core.rollout import Judgement, RolloutRequest, Verdict
from klong_jax.core.trajectory import Status, Trajectory, Turn, WindowSpan
from klong_jax.parallel.distributed import Place, is_first, start_processes
from klong_jax.parallel.mesh import MeshShape, make_mesh
from klong_jax.pipelines.compose import config_dir, validate
from klong_jax.pipelines.config.commands import RlConfig
from klong_jax.pipelines.config.training import ModelSection
from klong_jax.pipelines.policy import new_policy
from klong_jax.pipelines.process import computing
from klong_jax.pipelines.rl import train
from klong_jax.rollout import open_queue
from klong_jax.text.tokenizer import train_tokenizer

MODEL = ModelSection(
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=32,
    rope_theta=1e4,
    tie_embeddings=True,
    compute="float32",
)
TOKENIZER = train_tokenizer(["a b"] * 9, 400)
SETTINGS = [
    *("policy=x", "tasks=y", "splitting.context_limit=80", "splitting.reserve=8"),
    *("splitting.overlap=8", "rl.groups=2", "rl.rollouts=2", "rl.micro_batch=2", "rl.kl_beta=0.1"),
    *("rl.tokens_per_rollout=10", "rl.optimizer.learning_rate=0.02"),
    "rl.stages=[{timeout_s: 5, max_steps: 3, min_steps: 3, advance_score: 1.0}]",
]


def rolled_out(request: RolloutRequest) -> tuple[Trajectory, Judgement]:
    rng = np.random.default_rng(request.seed)
    turns = tuple(
        Turn(
            tuple(rng.integers(0, 250, 6).tolist()),
            tuple(rng.integers(0, 250, 5).tolist()),
            tuple((-5 - rng.random(5)).tolist()),
            ((0, 0),),
        )
        for _ in range(5)
    )
    spans = (WindowSpan(6, 6, 0, 33), WindowSpan(6, 22, 33, 55))
    messages = (Message("user", "build"), Message("assistant", "built"))
    name, score = request.trajectory_id, request.slot / 4
    return (
        Trajectory(name, request.task_id, messages, turns, spans, Status.DONE, 1.0, {}),
        Judgement(name, "a", "r", "exec", {"0": score}, score, Verdict.VALID),
    )


def made_up_arena(folder: Path) -> Any:
    queue = open_queue(str(folder / "rollouts.sqlite"), "run", 1)

    async def play(params: Any, version: int, groups: Collection[str]) -> None:
        assert all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params))
        for request in queue.lease("worker", 0.0, 60.0, limit=8):
            assert request.group_id in groups
            trajectory, judgement = rolled_out(request)
            queue.finish(trajectory, request, judgement)

    return SimpleNamespace(queue=queue, play=play)


def learn(root: Path, shape: MeshShape, shared: int = 0) -> None:
    several = jax.process_count() > 1
    name = f"{jax.process_count()}-processes" if several else f"{shape.devices}-devices"
    folder = root / name / "run"
    folder.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = validate("rl", compose("rl", [*SETTINGS, f"rl.shared_prefix={shared}"]))
    assert isinstance(config, RlConfig)
    mesh = make_mesh(shape, jax.devices()[: shape.devices])
    policy = new_policy(MODEL, TOKENIZER, 0, mesh)
    tasks: Any = [SimpleNamespace(task_id=name) for name in "ab"]
    arena = made_up_arena(folder) if is_first() else None
    with computing(mesh, config.kernels):
        asyncio.run(train(folder / "rl", config, policy, tasks, arena, Console(quiet=True)))


def main() -> None:
    folder, *rest = sys.argv[1:]
    if rest[0] == "--process":
        _, coordinator, index, *rest = rest
        start_processes(Place(coordinator, 2, int(index)))
    for given in map(json.loads, rest):
        shared = given.pop("shared", 0)
        learn(Path(folder), MeshShape(**given), shared)


if __name__ == "__main__":
    main()
