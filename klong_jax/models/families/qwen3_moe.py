"""Qwen3-MoE: Qwen3's attention; a softmax over experts of which the largest k are taken."""

from typing import Any

from klong_jax.core.errors import UserError
from klong_jax.models.config import DecoderConfig, MoeConfig
from klong_jax.models.families.base import Family, HfConfig, TensorMap, field, refuse_unless
from klong_jax.models.families.layers import (
    mixture_tensors,
    numbers_from_hf,
    numbers_to_hf,
)


def _from_hf(config: HfConfig) -> DecoderConfig:
    refuse_unless(config, model_type="qwen3_moe", attention_bias=False, decoder_sparse_step=1)
    dense = config.get("mlp_only_layers") or []
    if sorted(dense) != list(range(len(dense))):
        raise UserError(f"config.json: mlp_only_layers is {dense}; only leading layers may be.")
    moe = MoeConfig(
        num_experts=field(config, "num_experts", config.get("num_local_experts")),
        top_k=field(config, "num_experts_per_tok"),
        expert_size=field(config, "moe_intermediate_size"),
        normalise_top_k=field(config, "norm_topk_prob"),
        dense_layers=len(dense),
    )
    return DecoderConfig(**numbers_from_hf(config), qk_norm=True, moe=moe)


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    assert config.moe
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **numbers_to_hf(config),
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "moe_intermediate_size": config.moe.expert_size,
        "norm_topk_prob": config.moe.normalise_top_k,
        "mlp_only_layers": list(range(config.moe.dense_layers)),
        "decoder_sparse_step": 1,
    }


def _tensors(config: DecoderConfig) -> list[TensorMap]:
    return mixture_tensors(config, router="mlp.gate", shared="")


def _expresses(config: DecoderConfig) -> bool:
    moe = config.moe
    if moe is None or not config.qk_norm or config.attention_bias or config.rotary_fraction != 1:
        return False
    plain = not moe.router_bias and not moe.shared_size and moe.scaling_factor == 1
    return moe.router == "softmax" and plain


QWEN3_MOE = Family("qwen3_moe", _from_hf, _to_hf, _tensors, _expresses)
