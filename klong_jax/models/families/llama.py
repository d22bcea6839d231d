"""Llama 3: no query norms, no biases, and from 3.1 on stretched rotary frequencies."""

from typing import Any

from klong_jax.models.config import DecoderConfig
from klong_jax.models.families.base import Family, HfConfig, refuse_unless
from klong_jax.models.families.layers import dense_tensors, numbers_from_hf, numbers_to_hf


def _from_hf(config: HfConfig) -> DecoderConfig:
    refuse_unless(config, model_type="llama", attention_bias=False)
    return DecoderConfig(**numbers_from_hf(config), qk_norm=False)


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **numbers_to_hf(config),
    }


def _expresses(config: DecoderConfig) -> bool:
    plain = not config.attention_bias and config.rotary_fraction == 1
    return not config.qk_norm and config.moe is None and plain


LLAMA = Family("llama", _from_hf, _to_hf, dense_tensors, _expresses)
