"""What a family is: a mapping of config and weight names to the decoder and back."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from klong_jax.core.errors import UserError
from klong_jax.models.config import DecoderConfig, RopeScaling
from klong_jax.models.decoder import Params

HfConfig = Mapping[str, Any]
_REQUIRED = object()


@dataclass(frozen=True)
class TensorMap:
    """One parameter of the decoder and the Hugging Face tensors it is stacked from.

    Attributes:
        path: Where it is in the decoder's parameters.
        name: Its Hugging Face name; {layer} and {expert} stand for the numbers.
        transposed: Whether each matrix is stored transposed there.
        layers: The Hugging Face layers stacked along its first axis; None for no such axis.
        experts: How many experts are stacked along the next axis; 0 for no such axis.
    """

    path: tuple[str, ...]
    name: str
    transposed: bool = False
    layers: range | None = None
    experts: int = 0

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Each place along the stacked axes, and the name of the tensor that stands there."""
        if self.layers is None:
            yield (), self.name
            return
        for row, layer in enumerate(self.layers):
            if not self.experts:
                yield (row,), self.name.format(layer=layer)
            for expert in range(self.experts):
                yield (row, expert), self.name.format(layer=layer, expert=expert)


@dataclass(frozen=True)
class Family:
    """How Hugging Face writes the models of one architecture.

    Attributes:
        model_type: `model_type` of its config.json.
        config_from_hf: Reads a config.json; refuses by a UserError what the decoder cannot do.
        config_to_hf: The config.json that transformers builds the same model from.
        tensors: Every parameter of a decoder of this family.
        expresses: Whether a decoder can be written as a model of this family.
    """

    model_type: str
    config_from_hf: Callable[[HfConfig], DecoderConfig]
    config_to_hf: Callable[[DecoderConfig], dict[str, Any]]
    tensors: Callable[[DecoderConfig], list[TensorMap]]
    expresses: Callable[[DecoderConfig], bool]


def weights_to_hf(params: Params, tensors: list[TensorMap]) -> dict[str, np.ndarray]:
    """Parameters in memory under their Hugging Face names, layers and experts unstacked."""
    weights: dict[str, np.ndarray] = {}
    flat = dict(nnx.to_flat_state(params))
    for tensor in tensors:
        array = np.asarray(flat[tensor.path][...])
        for place, name in tensor.tensors():
            weights[name] = array[place].T if tensor.transposed else array[place]
    return weights


def weights_from_hf(
    params: Params, weights: Mapping[str, np.ndarray], tensors: list[TensorMap]
) -> Params:
    """Parameters of the shape and dtype of `params` with the values of Hugging Face weights."""
    maps = {tensor.path: tensor for tensor in tensors}

    def read(path: tuple[str, ...], like: Any) -> np.ndarray:
        array = np.empty(like.shape, like.dtype)
        for place, name in maps[path].tensors():
            array[place] = weights[name].T if maps[path].transposed else weights[name]
        return array

    flat = {
        path: value.replace(jnp.asarray(read(path, value)))
        for path, value in nnx.to_flat_state(params)
    }
    return nnx.from_flat_state(flat)


def field(config: HfConfig, name: str, default: Any = _REQUIRED) -> Any:
    """A field of a config.json.

    Raises:
        UserError: It is missing and has no default.
    """
    value = config.get(name)
    value = default if value is None else value
    if value is _REQUIRED:
        raise UserError(
            f"config.json: field {name!r} is missing; a model of type "
            f"{config.get('model_type')!r} needs it."
        )
    return value


def refuse_unless(config: HfConfig, **expected: Any) -> None:
    """Refuses a config.json that asks for what the decoder cannot do.

    Raises:
        UserError: A field is there and differs from what is expected.
    """
    for name, value in expected.items():
        if (got := config.get(name, value)) != value:
            raise UserError(
                f"config.json: {name} is {got!r}; models of type {config.get('model_type')!r} "
                f"are read with {value!r} only."
            )


def rope_from_hf(config: HfConfig) -> dict[str, Any]:
    """The decoder's rotary fields, from either way transformers has written them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(
            f"config.json: rope_type is {kind!r}; the decoder knows 'default' and 'llama3'."
        )
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            field(rope, "factor"),
            field(rope, "low_freq_factor"),
            field(rope, "high_freq_factor"),
            field(rope, "original_max_position_embeddings"),
        )
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        field(config, "rope_theta")
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return {"rope_theta": theta, "rope_scaling": scaling, "rotary_fraction": fraction}


def rope_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The rotary fields as transformers 4 wrote them and 5 still reads them."""
    scaling = config.rope_scaling
    written = scaling and {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }
    return {"rope_theta": config.rope_theta, "rope_scaling": written}
