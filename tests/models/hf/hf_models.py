"""Small models of every family, saved by transformers as their makers would."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import klong_jax.text

TOKENIZER = Path(klong_jax.text.__file__).parent / "bundled" / "tokenizer.json"
INDEX = "model.safetensors.index.json"
MTP = 3  # the number of the layer after the last

_NUMBERS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "tie_word_embeddings": False,
}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}

CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "qwen3": transformers.Qwen3Config(**_NUMBERS),
    "qwen3 tied": transformers.Qwen3Config(**{**_NUMBERS, "tie_word_embeddings": True}),
    "llama": transformers.LlamaConfig(
        **_NUMBERS,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**_NUMBERS, **_EXPERTS, num_experts=8),
    "glm4_moe": transformers.Glm4MoeConfig(
        **_NUMBERS,
        **_EXPERTS,
        n_routed_experts=8,
        n_shared_experts=1,
        first_k_dense_replace=1,
        attention_bias=True,
        use_qk_norm=True,
    ),
}


def make(
    kind: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard: str = "60KB",
    **numbers: Any,
) -> Path:
    """Saves a random model; GLM's with a float32 router bias and a layer for later tokens."""
    torch.manual_seed(0)
    config = type(CONFIGS[kind]).from_dict({**CONFIGS[kind].to_dict(), **numbers})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.data = torch.randn(buffer.shape)
    model.save_pretrained(folder, max_shard_size=shard)
    shutil.copy(TOKENIZER, folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    if kind == "glm4_moe":
        add_shard(
            folder,
            {
                f"model.layers.{MTP}.eh_proj.weight": torch.randn(48, 96).to(dtype),
                f"model.layers.{MTP}.enorm.weight": torch.randn(48),
                f"model.layers.{MTP}.codes": torch.arange(7, dtype=torch.int8),
            },
        )
    return folder


def add_shard(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Adds a file to a sharded model."""
    save_file(tensors, folder / "more.safetensors", {"format": "pt"})
    edit(
        folder / INDEX, weight_map={**shards(folder), **dict.fromkeys(tensors, "more.safetensors")}
    )


def edit(file: Path, **fields: Any) -> None:
    """Changes fields of a JSON file; None removes one."""
    values = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: v for name, v in values.items() if v is not None}))


def shards(folder: Path) -> dict[str, str]:
    """Tensor to file."""
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a directory's files hold."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
