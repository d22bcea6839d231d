"""Run on eight devices: attention spread over rows, heads and context equals it on one."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from klong_jax.kernels.attention import api, attention, sharded, tpu
from klong_jax.parallel.mesh import MeshShape, make_mesh
from klong_jax.parallel.rules import use_mesh

RAGGED = {
    "prefix_lengths": np.asarray([0, 10, 32, 7]),
    "lengths": np.asarray([64, 0, 33, 64]),
}

LENGTHS = [[20, 9, 35], [64], [1, 40], []]
PACKED = {
    "segments": np.stack(
        [np.pad(np.repeat(1 + np.arange(len(row)), row), (0, 64 - sum(row))) for row in LENGTHS]
    )
}

CASES: list[tuple[MeshShape, int, dict[str, Any]]] = [
    (MeshShape(fsdp=4, tensor=2), 4, RAGGED),
    (MeshShape(context=8), 1, {}),
    (MeshShape(context=4, fsdp=2), 4, RAGGED),
    (MeshShape(context=4, tensor=2), 4, {}),
    (MeshShape(context=4, tensor=2), 4, {**RAGGED, "causal": False}),
    (MeshShape(context=4, tensor=2), 4, {**RAGGED, "backend": "splash"}),
    (MeshShape(data=2, expert=2, context=2), 4, RAGGED),
    (MeshShape(context=2, tensor=2, fsdp=2), 4, {**PACKED, "backend": "splash"}),
]
"""Mesh, rows, options."""


def step(
    query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array, **options: Any
) -> tuple[jax.Array, ...]:
    out, pull = jax.vjp(partial(attention, **options), query, key, value)
    return out, *pull(cotangent)


def compare(arrays: list[jax.Array], mesh: MeshShape, options: dict[str, Any]) -> float:
    want = jax.jit(partial(step, **{**options, "backend": "reference"}))(*arrays)
    with use_mesh(make_mesh(mesh)):
        got = jax.jit(partial(step, **options))(*arrays)
    errors = [float(jnp.abs(one - other).max()) for one, other in zip(got, want, strict=True)]
    assert max(errors) < 1e-5, f"{mesh}: {errors}"
    return max(errors)


def balanced(devices: int) -> None:
    """Every device works on the same number of pairs of a query and a key it sees."""
    mesh = make_mesh(MeshShape(context=devices), jax.devices()[:devices])
    with use_mesh(mesh):
        positions = jax.shard_map(
            lambda: sharded._positions(64 // devices, ("context",), devices),
            in_specs=(),
            out_specs=jax.sharding.PartitionSpec("context"),
            check_vma=False,
        )()
    assert sorted(positions.tolist()) == list(range(64))
    assert len(set((positions + 1).reshape(devices, -1).sum(axis=1).tolist())) == 1


def main() -> None:
    """Compares every mesh with one device."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.float32(rng.normal(size=shape))

    arrays = [array(4, 64, 4, 16), array(4, 96, 2, 16), array(4, 96, 2, 16), array(4, 64, 4, 16)]
    api.BACKENDS = {**api.BACKENDS, "splash": partial(tpu.attention, interpret=True)}
    for mesh, rows, options in CASES:
        # Windows that share a row have no prefix.
        tokens = slice(-64, None) if "segments" in options else slice(None)
        error = compare([each[:rows, tokens] for each in arrays], mesh, options)
        print(f"{mesh!s:32} {', '.join(options):40} error {error:.1e}")
    balanced(4)


if __name__ == "__main__":
    main()
