"""Reads directories onto eight simulated devices; run by test_reader.py in a process of its own."""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import jax
import numpy as np

from klong_jax.models.decoder import abstract
from klong_jax.models.hf.directory import open_model
from klong_jax.models.hf.reader import read_params, stream_params
from klong_jax.parallel.mesh import MeshShape, make_mesh
from klong_jax.parallel.rules import param_shardings

MESHES = (
    MeshShape(fsdp=8),
    MeshShape(data=2, fsdp=2, tensor=2),
    MeshShape(expert=4, fsdp=2),
    MeshShape(context=2, expert=2, tensor=2),
)


def equal(folder: Path) -> None:
    """On every mesh the values are those of one device, and lie where the rules say."""
    model = open_model(folder)
    whole = jax.tree.leaves(read_params(model))
    for shape in MESHES:
        mesh = make_mesh(shape)
        wanted = jax.tree.leaves(param_shardings(abstract(model.config)[1], mesh))
        leaves = jax.tree.leaves(read_params(model, mesh=mesh))
        for got, want, sharding in zip(leaves, whole, wanted, strict=True):
            assert got.sharding == sharding
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def memory(folder: Path) -> None:
    """Prints by how many bytes the most memory ever held grows while the model passes by."""
    model = open_model(folder)
    mesh = make_mesh(MeshShape(fsdp=4, tensor=2))
    before = _most_memory()
    for _, array in stream_params(model, mesh=mesh):
        array.delete()
    print(_most_memory() - before)


def _most_memory() -> int:
    # Not getrusage(): its peak is the parent's where that was higher.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    for name in sys.argv[2:]:
        globals()[sys.argv[1]](Path(name))
