"""A directory that transformers loads, written a tensor at a time."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import write_json
from klong_jax.models.config import DecoderConfig, DType
from klong_jax.models.decoder import Params
from klong_jax.models.families import family_of
from klong_jax.models.hf.directory import INDEX, WEIGHTS, HfModel
from klong_jax.models.hf.tensorfile import DTYPES, Bytes, Writable, write_tensors

_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
_take = jax.jit(lambda leaf, place: leaf[place])


@dataclass(frozen=True)
class DecoderTensor:
    """One matrix of a decoder under its Hugging Face name, fetched when it is written.

    Attributes:
        name: The Hugging Face name.
        kind: What it is written as.
        shape: Its dimensions there.
        leaf: The stacked parameter.
        place: Where it stands along the stacked axes.
        transposed: Whether it is written transposed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    leaf: jax.Array
    place: tuple[int, ...]
    transposed: bool

    @property
    def size(self) -> int:
        """How many bytes."""
        return prod(self.shape) * DTYPES[self.kind].itemsize

    def chunks(self) -> Iterator[Bytes]:
        """Its bytes, at once."""
        matrix = np.asarray(_take(self.leaf, self.place)).astype(DTYPES[self.kind], copy=False)
        if self.transposed:
            matrix = matrix.T
        yield np.ascontiguousarray(matrix).reshape(-1).view(np.uint8).data


def plan_tensors(
    config: DecoderConfig, params: Params, original: HfModel | None, dtype: DType | None
) -> list[Writable]:
    """All tensors of an export, layer after layer.

    Args:
        config: The decoder.
        params: Its parameters.
        original: The directory it came from: tensors that the decoder does not know are carried
            over from it, and the dtype of each is taken from it.
        dtype: What the decoder's tensors are cast to instead; without both, each stays what it is.

    Raises:
        UserError: The original is of another architecture.
    """
    if original and original.config != config:
        theirs, ours = original.config.to_json(), config.to_json()
        differing = ", ".join(name for name in ours if ours[name] != theirs[name])
        raise UserError(
            f"{original.folder}/config.json: describes another decoder than the policy's "
            f"({differing}); give the directory that the policy came from."
        )
    maps = original.maps if original else family_of(config).tensors(config)
    leaves = dict(nnx.to_flat_state(params))
    planned: list[Writable] = []
    for one in maps:
        leaf = leaves[one.path][...]
        for place, name in one.tensors():
            if dtype:
                kind = _KINDS[np.dtype(dtype)]
            else:
                kind = original.tensors[name].kind if original else _KINDS[np.dtype(leaf.dtype)]
            shape = leaf.shape[len(place) :]
            shape = shape[::-1] if one.transposed else shape
            planned.append(DecoderTensor(name, kind, shape, leaf, place, one.transposed))
    if original:
        planned += [original.tensors[name] for name in original.passed_on]
    return sorted(planned, key=lambda tensor: _natural(tensor.name))


def write_model(
    folder: Path,
    hf_config: Mapping[str, Any],
    tensors: Sequence[Writable],
    *,
    shard_bytes: int,
    on_tensor: Callable[[Writable], None],
) -> None:
    """Writes config.json, the tensors in files of a size, and the index of several files.

    Args:
        folder: An existing directory.
        hf_config: The config.json, but for its dtype.
        tensors: What `plan_tensors` gave.
        shard_bytes: Most bytes of tensors in a file; one larger tensor has a file of its own.
        on_tensor: Called with each tensor once it is written.

    Raises:
        UserError: The disk refuses; names the file and the tensor.
    """
    shards = list(_shards(tensors, shard_bytes))
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WEIGHTS
        write_tensors(folder / file, shard, on_tensor)
        placed |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        total = {"total_size": sum(tensor.size for tensor in tensors)}
        write_json(folder / INDEX, {"metadata": total, "weight_map": placed})
    write_json(folder / "config.json", {**hf_config, **_dtype_field(hf_config, tensors)})


def _shards(tensors: Sequence[Writable], limit: int) -> Iterator[list[Writable]]:
    shard: list[Writable] = []
    filled = 0
    for tensor in tensors:
        if shard and filled + tensor.size > limit:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += tensor.size
    yield shard


def _dtype_field(hf_config: Mapping[str, Any], tensors: Sequence[Writable]) -> dict[str, str]:
    """What transformers loads the model as: the dtype of most of it, under either field's name."""
    sizes = Counter[str]()
    for tensor in tensors:
        if tensor.kind in DTYPES:
            sizes[tensor.kind] += tensor.size
    [(kind, _)] = sizes.most_common(1)
    name = "dtype" if "dtype" in hf_config else "torch_dtype"
    return {name: DTYPES[kind].name}


def _natural(name: str) -> list[str | int]:
    """Sorts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
