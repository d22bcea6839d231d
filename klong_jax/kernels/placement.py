"""What kernels ask of the active mesh."""

import jax
from jax.sharding import AxisType

Axes = tuple[str, ...]


def on_mesh() -> bool:
    """Whether there is a mesh with axes that no shard_map has mapped yet."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind != AxisType.Manual for size, kind in kinds)


def axes_of(part: Axes | str | None) -> Axes:
    """The mesh axes of one dimension of a PartitionSpec, which has several ways to write them."""
    if part is None:
        return ()
    return part if isinstance(part, tuple) else (part,)
