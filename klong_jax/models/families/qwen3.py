"""Qwen3: queries and keys are normalised a head; no biases."""

from typing import Any

from klong_jax.models.config import DecoderConfig
from klong_jax.models.families.base import Family, HfConfig, refuse_unless
from klong_jax.models.families.layers import dense_tensors, numbers_from_hf, numbers_to_hf

_HEAD_DIM = 128
"""Of all Qwen3 models; transformers takes it where it is not said."""


def _from_hf(config: HfConfig) -> DecoderConfig:
    refuse_unless(config, model_type="qwen3", attention_bias=False)
    return DecoderConfig(**numbers_from_hf({"head_dim": _HEAD_DIM, **config}), qk_norm=True)


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **numbers_to_hf(config),
    }


def _expresses(config: DecoderConfig) -> bool:
    plain = not config.attention_bias and config.rotary_fraction == 1
    return config.qk_norm and config.moe is None and plain


QWEN3 = Family("qwen3", _from_hf, _to_hf, dense_tensors, _expresses)
