"""Topologies are parsed and enumerated; a bound is the slowest resource's time."""

from types import SimpleNamespace

import numpy as np
import pytest

from klong_jax.core.errors import UserError
from klong_jax.parallel.mesh import MeshShape
from klong_jax.parallel.roofline import Work, axes_rate, bound
from klong_jax.parallel.topology import CHIPS, family, parse_topology


def laid_out(topology: str, shape: MeshShape) -> SimpleNamespace:
    """A mesh over a slice, devices in the order of their coordinates."""
    sizes = parse_topology(topology).shape
    devices = np.empty(int(np.prod(sizes)), object)
    for index, place in enumerate(np.ndindex(*sizes)):
        devices[index] = SimpleNamespace(coords=(*place, 0)[:3])
    return SimpleNamespace(devices=devices.reshape(shape.sizes))


def test_topologies_are_read_and_others_refused_with_the_remedy() -> None:
    topology = parse_topology("v5p:4x8x8")
    assert (str(topology), topology.chips, topology.chip) == ("v5p:4x8x8", 256, CHIPS["v5p"])
    for wrong in ("v5p:4x8", "v7:2x2x2", "v5e:0x8", "v5e"):
        with pytest.raises(UserError, match=r"as in v5p:4x8x8 or v5e:8x8; generations are v4, v5e"):
            parse_topology(wrong)


def test_a_family_grows_by_doubling_to_the_largest_slice() -> None:
    shapes = [str(topology) for topology in family(CHIPS["v5e"])]
    assert shapes == [
        "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"
    ]  # fmt: skip


def test_rings_send_both_ways_and_lines_one() -> None:
    topology = parse_topology("v5p:4x4x2")
    mesh = laid_out("v5p:4x4x2", MeshShape(data=4, fsdp=4, context=2))
    rate = CHIPS["v5p"].link_rate
    assert axes_rate(mesh, "data", topology) == 2 * rate
    assert axes_rate(mesh, "data+fsdp", topology) == 4 * rate
    # Two chips are a line.
    assert axes_rate(mesh, "context", topology) == rate
    assert axes_rate(mesh, "data+context", topology) == 3 * rate


def test_the_slowest_resource_sets_the_bound() -> None:
    topology = parse_topology("v5p:4x4x2")
    mesh = laid_out("v5p:4x4x2", MeshShape(data=4, fsdp=4, context=2))
    chip = topology.chip
    work = Work(3 * chip.flops, 4 * chip.flops, chip.hbm_rate, {"data": 2 * chip.link_rate})
    limits = bound(work, topology, mesh)
    assert (limits.compute, limits.memory, limits.links) == (4.0, 1.0, {"data": 1.0})
    assert (limits.seconds, limits.limit) == (4.0, "compute")
    assert limits.mfu == pytest.approx(0.75)
    assert limits.mfu_serial == pytest.approx(0.5)
    slow = Work(chip.flops, chip.flops, 0.0, {"context": 5 * chip.link_rate})
    assert bound(slow, topology, mesh).limit == "links"
