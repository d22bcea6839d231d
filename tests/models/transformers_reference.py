"""Small random models of every family in hostile settings, and the same in transformers."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

from klong_jax.models.config import DecoderConfig, MoeConfig, RopeScaling
from klong_jax.models.families import family_of

# vocabulary, width, layers, query heads, kv heads, head, MLP
SIZES = (97, 48, 3, 6, 2, 12, 80)
# Of the four frequencies of a head of 8 one is kept, one is in between, two are stretched.
STRETCHED = RopeScaling(8.0, 1.0, 4.0, 32)

CASES: dict[str, DecoderConfig] = {
    "qwen3: tied, 6 heads on 2": DecoderConfig(*SIZES, rope_theta=5e4),
    "qwen3: untied, 6 heads on 6": DecoderConfig(
        97, 48, 3, 6, 6, 12, 80, rope_theta=1e6, tie_embeddings=False
    ),
    "llama: untied, 6 heads on 1": DecoderConfig(
        97, 48, 3, 6, 1, 8, 80, rope_theta=5e5, norm_eps=1e-5, tie_embeddings=False, qk_norm=False
    ),
    "llama: tied, stretched rotary": DecoderConfig(
        97, 48, 3, 6, 2, 8, 80, rope_theta=100.0, norm_eps=1e-5, qk_norm=False,
        rope_scaling=STRETCHED,
    ),
    "qwen3_moe: 2 of 32, normalised, untied": DecoderConfig(
        *SIZES, tie_embeddings=False, moe=MoeConfig(32, 2, 20)
    ),
    "qwen3_moe: 3 of 24, not normalised, 1 dense layer, tied": DecoderConfig(
        *SIZES, moe=MoeConfig(24, 3, 20, normalise_top_k=False, dense_layers=1)
    ),
    "glm4_moe: 2 of 32, biases, half rotary, no qk-norm, 1 dense layer": DecoderConfig(
        *SIZES, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, qk_norm=False,
        attention_bias=True, rotary_fraction=0.5,
        moe=MoeConfig(32, 2, 20, "sigmoid", True, 20, 1, 2.5, True),
    ),
    "glm4_moe: 4 of 24, qk-norm, third rotary, not normalised, 2 shared, 2 dense, tied":
    DecoderConfig(
        *SIZES, norm_eps=1e-5, qk_norm=True, rotary_fraction=1 / 3,
        moe=MoeConfig(24, 4, 20, "sigmoid", False, 40, 2, 1.0, True),
    ),
    "glm4_moe: 1 of 16, biases, qk-norm, whole rotary, no dense layer": DecoderConfig(
        *SIZES, rope_theta=1e4, tie_embeddings=False, attention_bias=True,
        moe=MoeConfig(16, 1, 20, "sigmoid", False, 20, 0, 0.5, True),
    ),
}  # fmt: skip


def make_reference(config: DecoderConfig, *, double: bool = False) -> Any:
    """The model in transformers, every parameter and router bias drawn at random."""
    described = family_of(config).config_to_hf(config)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**described), attn_implementation="eager"
    )
    model.set_experts_implementation("eager")
    model = model.double() if double else model.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "norm" in name else 0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.3)
    return model.eval()


def on_disk(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors under the names that checkpoints have, where experts stand one by one."""
    weights: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        array = tensor.detach().numpy()
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for expert, both in enumerate(array):
                gate, up = np.split(both, 2)
                weights[f"{stem}{expert}.gate_proj.weight"] = gate
                weights[f"{stem}{expert}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(array):
                weights[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down
        else:
            weights[name] = array
    return weights


class _DoubleTorch:
    """torch with float64 where models ask for float32 by name, as they do for what is delicate."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def double_precision(config: DecoderConfig) -> Iterator[None]:
    """Takes the float32 islands out of a family's code in transformers."""
    kind = family_of(config).model_type
    modules = [
        importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"),
        importlib.import_module("transformers.modeling_rope_utils"),
    ]
    for module in modules:
        module.torch = _DoubleTorch()
    try:
        yield
    finally:
        for module in modules:
            module.torch = torch
