"""GLM-4.5 and GLM-4.5-Air: a sigmoid router with a bias for the choice, and a shared expert.

What its config.json leaves unsaid or says elsewhere: biases stand on queries, keys and values and
not on the output; half of a head is rotated, its two halves against each other; the layer after
the last predicts the token after the next and is no part of the decoder.
"""

from typing import Any

from klong_jax.models.config import DecoderConfig, MoeConfig
from klong_jax.models.families.base import Family, HfConfig, TensorMap, field, refuse_unless
from klong_jax.models.families.layers import mixture_tensors, numbers_from_hf, numbers_to_hf

_ROTARY_FRACTION = 0.5


def _from_hf(config: HfConfig) -> DecoderConfig:
    refuse_unless(config, model_type="glm4_moe", n_group=1, topk_group=1)
    expert_size = field(config, "moe_intermediate_size")
    moe = MoeConfig(
        num_experts=field(config, "n_routed_experts"),
        top_k=field(config, "num_experts_per_tok"),
        expert_size=expert_size,
        router="sigmoid",
        normalise_top_k=field(config, "norm_topk_prob"),
        shared_size=expert_size * field(config, "n_shared_experts"),
        dense_layers=field(config, "first_k_dense_replace"),
        scaling_factor=field(config, "routed_scaling_factor"),
        router_bias=True,
    )
    return DecoderConfig(
        **numbers_from_hf({"partial_rotary_factor": _ROTARY_FRACTION, **config}),
        qk_norm=field(config, "use_qk_norm", False),
        attention_bias=field(config, "attention_bias", False),
        moe=moe,
    )


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    assert config.moe
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        **numbers_to_hf(config),
        "partial_rotary_factor": config.rotary_fraction,
        "use_qk_norm": config.qk_norm,
        "n_routed_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "moe_intermediate_size": config.moe.expert_size,
        "norm_topk_prob": config.moe.normalise_top_k,
        "n_shared_experts": config.moe.shared_size // config.moe.expert_size,
        "first_k_dense_replace": config.moe.dense_layers,
        "routed_scaling_factor": config.moe.scaling_factor,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    }


def _tensors(config: DecoderConfig) -> list[TensorMap]:
    return mixture_tensors(config, router="mlp.gate", shared="mlp.shared_experts")


def _expresses(config: DecoderConfig) -> bool:
    moe = config.moe
    if moe is None:
        return False
    shared = moe.shared_size > 0 and moe.shared_size % moe.expert_size == 0
    return moe.router == "sigmoid" and moe.router_bias and shared


GLM4_MOE = Family("glm4_moe", _from_hf, _to_hf, _tensors, _expresses)
