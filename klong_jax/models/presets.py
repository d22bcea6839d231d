"""Real models by name, for what needs their numbers and not their weights."""

from klong_jax.core.errors import UserError
from klong_jax.models.config import DecoderConfig, MoeConfig, RopeScaling

_QWEN3_VOCAB, _GLM_VOCAB = 151_936, 151_552

PRESETS: dict[str, DecoderConfig] = {
    "qwen3_0_6b": DecoderConfig(_QWEN3_VOCAB, 1024, 28, 16, 8, 128, 3072),
    "qwen3_8b": DecoderConfig(_QWEN3_VOCAB, 4096, 36, 32, 8, 128, 12_288, tie_embeddings=False),
    "qwen3_30b_a3b": DecoderConfig(
        _QWEN3_VOCAB, 2048, 48, 32, 4, 128, 6144, tie_embeddings=False, moe=MoeConfig(128, 8, 768)
    ),
    "llama3_8b": DecoderConfig(
        128_256,
        4096,
        32,
        32,
        8,
        128,
        14_336,
        rope_theta=5e5,
        norm_eps=1e-5,
        tie_embeddings=False,
        qk_norm=False,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    ),
    "glm45_air": DecoderConfig(
        _GLM_VOCAB,
        4096,
        46,
        96,
        8,
        128,
        10_944,
        norm_eps=1e-5,
        tie_embeddings=False,
        qk_norm=False,
        attention_bias=True,
        rotary_fraction=0.5,
        moe=MoeConfig(128, 8, 1408, "sigmoid", shared_size=1408, dense_layers=1, router_bias=True),
    ),
    "glm45": DecoderConfig(
        _GLM_VOCAB,
        5120,
        92,
        96,
        8,
        128,
        12_288,
        norm_eps=1e-5,
        tie_embeddings=False,
        attention_bias=True,
        rotary_fraction=0.5,
        moe=MoeConfig(
            160,
            8,
            1536,
            "sigmoid",
            shared_size=1536,
            dense_layers=3,
            scaling_factor=2.5,
            router_bias=True,
        ),
    ),
}
"""Qwen3, Qwen3-MoE, Llama 3.1 and GLM-4.5, the last two without the layer that looks ahead."""


def preset(name: str) -> DecoderConfig:
    """The numbers of a real model.

    Raises:
        UserError: There is none of that name.
    """
    if name not in PRESETS:
        raise UserError(f"model={name!r} is unknown; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
