"""The mesh of devices: five axes, always all of them; one that is not used has size 1."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from klong_jax.core.errors import UserError

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""From the axis that communicates least to the one that communicates most."""


@dataclass(frozen=True)
class MeshShape:
    """How many devices each axis spans.

    Attributes:
        data: Replicas of everything; windows are spread over them.
        fsdp: Windows are spread over it, and so are parameters and their optimiser state.
        expert: Experts of a mixture are spread over it; to other layers it is a second fsdp.
        context: The tokens of one window are spread over it; parameters are stored spread too.
        tensor: Heads, MLP columns and vocabulary are spread over it.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis, size in asdict(self).items():
            if size < 1:
                raise UserError(f"mesh.{axis}={size}: give each axis at least one device.")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def devices(self) -> int:
        """How many devices the mesh takes."""
        return prod(self.sizes)

    def __str__(self) -> str:
        used = [f"{axis} {size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return " x ".join(used) or "one device"


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays a mesh over devices so that neighbours on an axis are neighbours in the machine.

    Args:
        shape: Sizes of the axes.
        devices: All devices of all hosts if not given.

    Raises:
        UserError: The sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if shape.devices != len(devices):
        raise UserError(
            f"mesh: {shape} takes {shape.devices} devices, but there are {len(devices)}; change "
            "one of mesh.data, mesh.fsdp, mesh.expert, mesh.context, mesh.tensor."
        )
    if devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape.sizes, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(shape.sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
