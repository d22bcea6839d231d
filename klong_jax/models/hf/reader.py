"""Weights of a Hugging Face directory, read straight to the devices that hold them."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from klong_jax.core.errors import UserError
from klong_jax.models.config import DTypes
from klong_jax.models.decoder import Params, abstract
from klong_jax.models.families.base import TensorMap
from klong_jax.models.hf.directory import HfModel
from klong_jax.models.hf.tensorfile import Index, StoredTensor
from klong_jax.models.placed import placed

Path = tuple[str, ...]
OnTensor = Callable[[str], None]


def read_params(
    model: HfModel,
    *,
    mesh: Mesh | None = None,
    dtypes: DTypes | None = None,
    on_tensor: OnTensor = lambda name: None,
) -> Params:
    """The decoder's parameters.

    Args:
        model: The opened directory.
        mesh: Where they go; one device if not given.
        dtypes: What they are cast to; each stays what it is in the directory if not given.
        on_tensor: Called with the name of each tensor of which a part was read.

    Raises:
        UserError: A tensor is of a kind that cannot be computed with, or the mesh does not divide
            a parameter.
    """
    variables = dict(nnx.to_flat_state(abstract(model.config)[1]))
    stream = stream_params(model, mesh=mesh, dtypes=dtypes, on_tensor=on_tensor)
    return nnx.from_flat_state({path: variables[path].replace(array) for path, array in stream})


def stream_params(
    model: HfModel,
    *,
    mesh: Mesh | None = None,
    dtypes: DTypes | None = None,
    on_tensor: OnTensor = lambda name: None,
) -> Iterator[tuple[Path, jax.Array]]:
    """Path and value of one parameter after the other.

    The host holds what one device is about to be given of one parameter, and nothing else.
    """
    wanted = dict(nnx.to_flat_state(placed(model.config, dtypes or DTypes(), mesh)[1]))
    for one in model.maps:
        like = wanted[one.path].get_value()
        dtype = np.dtype(like.dtype) if dtypes else _stored_dtype(model, one)
        parts = []
        # jax.make_array_from_callback would hold the slices of all of this host's devices at once.
        for index, devices in _slices(like.sharding, like.shape):
            block = assemble(one, model.tensors, index, dtype, on_tensor)
            parts += [jax.device_put(block, device) for device in devices]
            jax.block_until_ready(parts)
            del block
        yield one.path, jax.make_array_from_single_device_arrays(like.shape, like.sharding, parts)


def _stored_dtype(model: HfModel, one: TensorMap) -> np.dtype[Any]:
    """The dtype that holds all tensors of a parameter exactly."""
    tensors = [model.tensors[name] for _, name in one.tensors()]
    dtype = np.result_type(*{tensor.dtype for tensor in tensors})
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        wide = next(tensor for tensor in tensors if tensor.dtype == dtype)
        raise UserError(
            f"{wide.file}: {wide.name} is stored as {wide.kind}, which JAX does not compute with "
            "here; give dtype=float32."
        )
    return dtype


def _slices(sharding: Sharding, shape: tuple[int, ...]) -> Iterator[tuple[Index, list[jax.Device]]]:
    """Each slice that this host's devices hold, and which of them do."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        parts = zip(index or (), shape, strict=True)
        holders[tuple(part.indices(size)[:2] for part, size in parts)].append(device)
    for bounds, devices in holders.items():
        yield tuple(slice(*bound) for bound in bounds), devices


def assemble(
    one: TensorMap,
    tensors: dict[str, StoredTensor],
    index: Index,
    dtype: np.dtype[Any],
    on_tensor: OnTensor,
) -> np.ndarray:
    """A slice of a stacked parameter from the slices of its tensors that lie in it."""
    block = np.empty([part.stop - part.start for part in index], dtype)
    for place, name in one.tensors():
        stacked, rest = index[: len(place)], index[len(place) :]
        if all(part.start <= at < part.stop for at, part in zip(place, stacked, strict=True)):
            within = tuple(at - part.start for at, part in zip(place, stacked, strict=True))
            tensor = tensors[name]
            block[within] = tensor.read(rest[::-1]).T if one.transposed else tensor.read(rest)
            on_tensor(name)
    return block
