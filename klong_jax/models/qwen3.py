"""Qwen3: how its Hugging Face config and weights map to the decoder and back."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from klong_jax.core.errors import UserError
from klong_jax.models.config import DecoderConfig
from klong_jax.models.decoder import Params

# Decoder path -> Hugging Face name, and whether the matrix is stored transposed there.
_TOP: dict[tuple[str, ...], tuple[str, bool]] = {
    ("embedding",): ("model.embed_tokens.weight", False),
    ("unembedding",): ("lm_head.weight", False),
    ("norm", "scale"): ("model.norm.weight", False),
}
_LAYER: dict[tuple[str, ...], tuple[str, bool]] = {
    ("attention_norm", "scale"): ("input_layernorm.weight", False),
    ("mlp_norm", "scale"): ("post_attention_layernorm.weight", False),
    ("query", "kernel"): ("self_attn.q_proj.weight", True),
    ("key", "kernel"): ("self_attn.k_proj.weight", True),
    ("value", "kernel"): ("self_attn.v_proj.weight", True),
    ("output", "kernel"): ("self_attn.o_proj.weight", True),
    ("query_norm", "scale"): ("self_attn.q_norm.weight", False),
    ("key_norm", "scale"): ("self_attn.k_norm.weight", False),
    ("gate", "kernel"): ("mlp.gate_proj.weight", True),
    ("up", "kernel"): ("mlp.up_proj.weight", True),
    ("down", "kernel"): ("mlp.down_proj.weight", True),
}


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Qwen3 `config.json`.

    Raises:
        UserError: The config is of another model type.
    """
    if config.get("model_type") != "qwen3":
        raise UserError(
            f"config.json: model_type is {config.get('model_type')!r}; this reader knows 'qwen3'."
        )
    rope = config.get("rope_parameters") or {}
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate_size=config["intermediate_size"],
        rope_theta=rope.get("rope_theta", config.get("rope_theta", 1e6)),
        norm_eps=config["rms_norm_eps"],
        tie_embeddings=config["tie_word_embeddings"],
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers builds the same model from."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
    }


def weights_to_hf(params: Params, config: DecoderConfig) -> dict[str, np.ndarray]:
    """Parameters under their Hugging Face names, layers unstacked."""
    weights: dict[str, np.ndarray] = {}
    for path, value in nnx.to_flat_state(params):
        array = np.asarray(value[...])
        if path[0] != "blocks":
            weights[_TOP[path][0]] = array
            continue
        name, transposed = _LAYER[path[1:]]
        for layer in range(config.num_layers):
            matrix = array[layer].T if transposed else array[layer]
            weights[f"model.layers.{layer}.{name}"] = matrix
    return weights


def weights_from_hf(
    params: Params, weights: Mapping[str, np.ndarray], config: DecoderConfig
) -> Params:
    """Parameters of the shape of `params` with the values of Hugging Face weights."""

    def read(path: tuple[str, ...]) -> np.ndarray:
        if path[0] != "blocks":
            return weights[_TOP[path][0]]
        name, transposed = _LAYER[path[1:]]
        layers = [weights[f"model.layers.{i}.{name}"] for i in range(config.num_layers)]
        return np.stack([layer.T if transposed else layer for layer in layers])

    flat = {
        path: value.replace(jnp.asarray(read(path))) for path, value in nnx.to_flat_state(params)
    }
    return nnx.from_flat_state(flat)
