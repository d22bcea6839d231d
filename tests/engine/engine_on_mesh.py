"""Samples on a mesh of 8 CPU devices and on one; run as a program."""

import asyncio
import os
from functools import partial

os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import numpy as np
from test_engine import CHAT, GRAPH, LIMIT, MODEL, PARAMS, make_engine, prompt, speak

from klong_jax.engine.engine import Engine, EngineConfig
from klong_jax.models.decoder import FLOAT32
from klong_jax.parallel.mesh import MeshShape, make_mesh
from klong_jax.parallel.rules import SERVING, use_mesh

MESH = make_mesh(MeshShape(fsdp=4, context=2))
TURNS = [prompt(21), prompt(40, seed=1)]


def main() -> None:
    # Three slots are not a multiple of what fsdp shares.
    config, scope = EngineConfig(3, LIMIT, 1.0, 8, 4), partial(use_mesh, MESH, SERVING)
    spread = Engine(GRAPH, MODEL, CHAT, config, FLOAT32, scope)
    spread.load(PARAMS, 3)
    assert len(spread._cache[0].sharding.device_set) == 8
    alone = make_engine(3)
    for one, other in zip(*(asyncio.run(speak(e, 2, TURNS)) for e in (spread, alone)), strict=True):
        assert one.output_ids == other.output_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


if __name__ == "__main__":
    main()
