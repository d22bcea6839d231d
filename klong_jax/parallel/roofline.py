"""The least time a program can take: each of a chip's resources, used without pause.

A bound, not a forecast. The bound with overlap assumes that compute, memory and links all run at
their peak at the same time; the one without adds them up. What runs is slower than the second only
if a resource falls short of its peak: kernels below peak, latencies, congestion.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from klong_jax.parallel.mesh import AXES
from klong_jax.parallel.topology import Chip, Topology


@dataclass(frozen=True)
class Work:
    """What one device does in one run of a program.

    Attributes:
        model_flops: Operations that the mathematics asks for.
        flops: Operations with those that rematerialisation repeats.
        hbm_bytes: Bytes read from and written to memory, at least.
        sent: Bytes sent, by mesh axes joined with "+".
    """

    model_flops: float
    flops: float
    hbm_bytes: float
    sent: Mapping[str, float]


@dataclass(frozen=True)
class Bound:
    """Seconds that each resource takes.

    Attributes:
        compute: Of the matrix units.
        memory: Of the memory.
        links: Of the links, by mesh axes.
        useful: Of the matrix units, for the operations that the mathematics asks for.
    """

    compute: float
    memory: float
    links: Mapping[str, float]
    useful: float

    @property
    def seconds(self) -> float:
        """The bound if everything overlaps."""
        return max(self.compute, self.memory, sum(self.links.values()))

    @property
    def serial(self) -> float:
        """The bound if nothing does."""
        return self.compute + self.memory + sum(self.links.values())

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation if everything overlaps."""
        return self.useful / self.seconds if self.seconds else 0.0

    @property
    def mfu_serial(self) -> float:
        """The same if nothing does."""
        return self.useful / self.serial if self.serial else 0.0

    @property
    def limit(self) -> str:
        """What sets it."""
        network = sum(self.links.values())
        times = {"compute": self.compute, "memory": self.memory, "links": network}
        return max(times, key=lambda name: times[name])


def bound(work: Work, topology: Topology, mesh: Any) -> Bound:
    """The bound of a program on a mesh over a topology."""
    chip = topology.chip
    links = {axes: sent / axes_rate(mesh, axes, topology) for axes, sent in work.sent.items()}
    compute, memory = work.flops / chip.flops, work.hbm_bytes / chip.hbm_rate
    return Bound(compute, memory, links, work.model_flops / chip.flops)


def axes_rate(mesh: Any, axes: str, topology: Topology) -> float:
    """Bytes a second that a device can send to its group along mesh axes.

    A group that fills a ring of the torus sends both ways around; on a line, what the far end needs
    passes each link once. Dimensions of the torus add up.
    """
    index = tuple(slice(None) if axis in axes.split("+") else 0 for axis in AXES)
    group = mesh.devices[index].ravel()
    coordinates = np.array([device.coords for device in group])
    rate = 0.0
    for dimension, size in enumerate(topology.shape):
        extent = len(set(coordinates[:, dimension]))
        if extent > 1:
            rate += _ways(topology.chip, extent, size) * topology.chip.link_rate
    return rate or topology.chip.link_rate


def _ways(chip: Chip, extent: int, size: int) -> int:
    return 2 if extent == size and size % chip.wrap == 0 else 1
