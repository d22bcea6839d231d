"""A Hugging Face directory, opened and checked before any weight is read."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import Json, read_json
from klong_jax.models.config import DecoderConfig
from klong_jax.models.decoder import abstract
from klong_jax.models.families import family_of_hf
from klong_jax.models.families.base import TensorMap
from klong_jax.models.hf.tensorfile import StoredTensor, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, _UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
# Rotary frequencies that old checkpoints carry; they follow from the config.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class HfModel:
    """What a directory holds.

    Attributes:
        folder: The directory.
        hf_config: Its config.json.
        config: The decoder it describes.
        maps: How the decoder's parameters are made of its tensors.
        tensors: Every tensor, by name.
        passed_on: Names of tensors that the decoder has no use for, such as GLM-4.5's layer for
            multi-token prediction; an export carries them over.
    """

    folder: Path
    hf_config: dict[str, Any]
    config: DecoderConfig
    maps: tuple[TensorMap, ...]
    tensors: dict[str, StoredTensor]
    passed_on: tuple[str, ...]


def open_model(folder: Path) -> HfModel:
    """Opens a directory and checks that every tensor is there and of the right shape.

    Raises:
        UserError: It is incomplete, inconsistent or of an architecture that klong does not know;
            names the tensor and the file.
    """
    hf_config, config = read_config(folder)
    maps = tuple(family_of_hf(hf_config).tensors(config))
    tensors = _tensors(folder)
    wanted = dict(wanted_shapes(config, maps))
    for name, shape in wanted.items():
        if name not in tensors:
            raise UserError(_missing(folder, name, config))
        if tensors[name].shape != shape:
            raise UserError(
                f"{tensors[name].file}: {name} has shape {tensors[name].shape}, but "
                f"{folder}/config.json asks for {shape}; one of them belongs to another model."
            )
    others = sorted(tensors.keys() - wanted.keys())
    for name in others:
        _check_unused(tensors, name, config)
    passed_on = tuple(n for n in others if n != _UNEMBEDDING and not _DERIVED.fullmatch(n))
    return HfModel(folder, hf_config, config, maps, tensors, passed_on)


def read_config(folder: Path) -> tuple[dict[str, Any], DecoderConfig]:
    """The directory's config.json, and the decoder it describes.

    Raises:
        UserError: It is missing, or describes no decoder that klong knows.
    """
    hf_config: Json = read_json(folder / "config.json")
    if not isinstance(hf_config, dict):
        raise UserError(f"{folder}/config.json: holds no JSON object; fetch it again.")
    try:
        return hf_config, family_of_hf(hf_config).config_from_hf(hf_config)
    except UserError as error:
        raise UserError(f"{folder}/{error}") from None


def wanted_shapes(
    config: DecoderConfig, maps: tuple[TensorMap, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each Hugging Face tensor of a decoder and its shape there."""
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(abstract(config)[1])}
    for one in maps:
        for place, name in one.tensors():
            shape = tuple(shapes[one.path][len(place) :])
            yield name, shape[::-1] if one.transposed else shape


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists():
        return read_header(single)
    if not index.exists():
        raise UserError(
            f"{folder}: holds neither {WEIGHTS} nor {INDEX}; give the folder of a model."
        )
    placed = read_json(index)
    placed = placed.get("weight_map") if isinstance(placed, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files; fetch it again.")
    tensors: dict[str, StoredTensor] = {}
    headers: dict[str, dict[str, StoredTensor]] = {}
    for name, shard in placed.items():
        if shard not in headers:
            if not (folder / shard).is_file():
                raise UserError(
                    f"{folder / shard}: no such file, though {INDEX} places {name} there; fetch it."
                )
            headers[shard] = read_header(folder / shard)
        if name not in headers[shard]:
            raise UserError(
                f"{folder / shard}: lacks {name}, which {INDEX} places there; fetch both again."
            )
        tensors[name] = headers[shard][name]
    return tensors


def _missing(folder: Path, name: str, config: DecoderConfig) -> str:
    if name == _UNEMBEDDING:
        return (
            f"{folder}/config.json: tie_word_embeddings is false, but no file holds {name}; set it "
            "to true or fetch the missing file."
        )
    return f"{folder}: no file holds {name}, which config.json asks for; fetch the missing file."


def _check_unused(tensors: dict[str, StoredTensor], name: str, config: DecoderConfig) -> None:
    tensor = tensors[name]
    if name == _UNEMBEDDING and not _same(tensor, tensors[EMBEDDING]):
        raise UserError(
            f"{tensor.file}: {name} differs from {EMBEDDING}, though config.json says that they "
            "are tied; set tie_word_embeddings to false or remove the tensor."
        )
    layer = _LAYER.match(name)
    if layer and int(layer[1]) < config.num_layers and not _DERIVED.fullmatch(name):
        raise UserError(
            f"{tensor.file}: the decoder has no place for {name}; without it the model would be "
            "another one."
        )


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.kind, one.shape) != (other.kind, other.shape):
        return False
    return all(a == b for a, b in zip(one.chunks(), other.chunks(), strict=True))
