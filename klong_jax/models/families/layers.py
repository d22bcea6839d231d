"""What all families share: the numbers of the decoder, and the names of its tensors."""

from typing import Any

from klong_jax.models.config import DecoderConfig
from klong_jax.models.families.base import (
    HfConfig,
    TensorMap,
    field,
    refuse_unless,
    rope_from_hf,
    rope_to_hf,
)

_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def numbers_from_hf(config: HfConfig) -> dict[str, Any]:
    """The decoder's fields that every family writes alike."""
    refuse_unless(config, hidden_act="silu", use_sliding_window=False, mlp_bias=False)
    width, heads = field(config, "hidden_size"), field(config, "num_attention_heads")
    head_dim = config.get("head_dim")
    if head_dim is None:
        # What transformers takes; where it leaves a rest, it is not what the model has.
        head_dim = width // heads if width % heads == 0 else field(config, "head_dim")
    return {
        "vocab_size": field(config, "vocab_size"),
        "hidden_size": width,
        "num_layers": field(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": field(config, "num_key_value_heads"),
        "head_dim": head_dim,
        "intermediate_size": field(config, "intermediate_size"),
        "norm_eps": field(config, "rms_norm_eps"),
        "tie_embeddings": field(config, "tie_word_embeddings", False),
        **rope_from_hf(config),
    }


def numbers_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The fields of config.json that every family writes alike."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "hidden_act": "silu",
        **rope_to_hf(config),
    }


def top_tensors(config: DecoderConfig) -> list[TensorMap]:
    """The embeddings and the last norm."""
    untied = [] if config.tie_embeddings else [TensorMap(("unembedding",), "lm_head.weight")]
    return [
        TensorMap(("embedding",), "model.embed_tokens.weight"),
        TensorMap(("norm", "scale"), "model.norm.weight"),
        *untied,
    ]


def attention_tensors(config: DecoderConfig, stack: str, layers: range) -> list[TensorMap]:
    """The norms and the attention of one stack of blocks."""

    def tensor(path: tuple[str, str], name: str, transposed: bool = False) -> TensorMap:
        return TensorMap((stack, *path), f"model.layers.{{layer}}.{name}", transposed, layers)

    tensors = [tensor((ours, "scale"), f"{theirs}.weight") for ours, theirs in _NORMS.items()]
    tensors.append(tensor(("output", "kernel"), "self_attn.o_proj.weight", True))
    for ours, theirs in _PROJECTIONS.items():
        tensors.append(tensor((ours, "kernel"), f"self_attn.{theirs}.weight", True))
        if config.attention_bias:
            tensors.append(tensor((ours, "bias"), f"self_attn.{theirs}.bias"))
    if config.qk_norm:
        tensors.append(tensor(("query_norm", "scale"), "self_attn.q_norm.weight"))
        tensors.append(tensor(("key_norm", "scale"), "self_attn.k_norm.weight"))
    return tensors


def mlp_tensors(
    path: tuple[str, ...], name: str, layers: range, experts: int = 0
) -> list[TensorMap]:
    """The three matrices of an MLP, of a shared expert, or of each routed expert."""
    return [
        TensorMap(
            (*path, ours, "kernel"), f"model.layers.{{layer}}.{name}.{theirs}.weight", True,
            layers, experts,
        )
        for ours, theirs in _MLP.items()
    ]  # fmt: skip


def dense_tensors(config: DecoderConfig) -> list[TensorMap]:
    """Every tensor of a decoder without experts."""
    layers = range(config.num_layers)
    return [
        *top_tensors(config),
        *attention_tensors(config, "blocks", layers),
        *mlp_tensors(("blocks",), "mlp", layers),
    ]


def mixture_tensors(config: DecoderConfig, *, router: str, shared: str) -> list[TensorMap]:
    """Every tensor of a decoder with experts, behind leading dense layers if it has such.

    Args:
        config: The decoder.
        router: How the router is called in a layer.
        shared: How the shared expert is; without one it is not asked for.
    """
    moe, path = config.moe, ("blocks", "moe")
    assert moe
    dense, sparse = range(config.dense_layers), range(config.dense_layers, config.num_layers)
    name = f"model.layers.{{layer}}.{router}"
    tensors = [
        *top_tensors(config),
        *attention_tensors(config, "blocks", sparse),
        TensorMap((*path, "router", "kernel"), f"{name}.weight", True, sparse),
        *mlp_tensors((*path, "experts"), "mlp.experts.{expert}", sparse, moe.num_experts),
    ]
    if moe.router_bias:
        bias = f"{name}.e_score_correction_bias"
        tensors.append(TensorMap((*path, "router", "bias"), bias, False, sparse))
    if moe.shared_size:
        tensors += mlp_tensors((*path, "shared"), shared, sparse)
    if dense:
        tensors += attention_tensors(config, "dense_blocks", dense)
        tensors += mlp_tensors(("dense_blocks",), "mlp", dense)
    return tensors
