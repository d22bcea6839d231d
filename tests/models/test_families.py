"""Configs and weights of every family, both ways; and real models by name."""

import math

import jax
import numpy as np
import pytest
import transformers
from flax import nnx
from transformers_reference import CASES, make_reference, on_disk

from klong_jax.core.errors import UserError
from klong_jax.models.config import DecoderConfig, MoeConfig, RopeScaling
from klong_jax.models.decoder import abstract
from klong_jax.models.families import FAMILIES, family_of, family_of_hf
from klong_jax.models.families.base import weights_from_hf, weights_to_hf
from klong_jax.models.presets import PRESETS, preset


@pytest.mark.parametrize("case", CASES)
def test_configs_survive_transformers(case: str) -> None:
    config = CASES[case]
    family = family_of(config)
    written = family.config_to_hf(config)
    assert family_of_hf(written) is family
    assert family.config_from_hf(written) == config
    theirs = transformers.AutoConfig.for_model(**written).to_dict()
    assert family.config_from_hf(theirs) == config
    assert DecoderConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("case", CASES)
def test_weights_survive_the_round_trip_bit_for_bit(case: str) -> None:
    config = CASES[case]
    model = make_reference(config)
    originals = on_disk(model, model.state_dict())
    _, shapes = abstract(config)
    tensors = family_of(config).tensors(config)
    assert {tensor.path for tensor in tensors} == {path for path, _ in nnx.to_flat_state(shapes)}
    back = weights_to_hf(weights_from_hf(shapes, originals, tensors), tensors)
    missing = {"lm_head.weight"} if config.tie_embeddings else set()
    assert set(originals) - set(back) == missing
    for name, value in back.items():
        np.testing.assert_array_equal(value, originals[name])


def written(**changes: object) -> dict[str, object]:
    config = CASES["glm4_moe: 2 of 32, biases, half rotary, no qk-norm, 1 dense layer"]
    return {**family_of(config).config_to_hf(config), **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; the known ones are qwen3, qwen3_moe"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; .* 'silu' only"),
        ({"n_group": 4}, "n_group is 4"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"head_dim": None}, "field 'head_dim' is missing"),
        ({"n_routed_experts": None}, "field 'n_routed_experts' is missing"),
    ],
)
def test_what_the_decoder_cannot_do_is_named(changes: dict[str, object], said: str) -> None:
    config = {name: value for name, value in written(**changes).items() if value is not None}
    if "head_dim" in changes:
        config["num_attention_heads"] = 5
    with pytest.raises(UserError, match=said):
        family_of_hf(config).config_from_hf(config)


def test_heads_are_as_wide_as_transformers_takes_them_where_it_is_not_said() -> None:
    config = {name: value for name, value in written().items() if name != "head_dim"}
    assert FAMILIES["glm4_moe"].config_from_hf(config).head_dim == 48 // 6
    qwen3 = transformers.Qwen3Config().to_dict()
    del qwen3["head_dim"]
    assert FAMILIES["qwen3"].config_from_hf(qwen3).head_dim == 128


def test_a_decoder_of_no_family_is_refused() -> None:
    with pytest.raises(UserError, match="no Hugging Face architecture"):
        family_of(DecoderConfig(97, 48, 3, 6, 2, 12, 80, attention_bias=True))


def test_real_models_have_the_published_number_of_parameters() -> None:
    published = {
        "qwen3_0_6b": 596_049_920,
        "qwen3_8b": 8_190_735_360,
        "qwen3_30b_a3b": 30_532_122_624,
        "llama3_8b": 8_030_261_248,
        "glm45_air": 110_468_824_832,
        "glm45": 358_337_791_296,
    }
    for name, config in PRESETS.items():
        leaves = jax.tree.leaves(abstract(config)[1])
        total = sum(math.prod(leaf.shape) for leaf in leaves)
        assert total + looking_ahead(config) == published[name], name
    with pytest.raises(UserError, match="choose one of qwen3_0_6b"):
        preset("gpt5")


def looking_ahead(config: DecoderConfig) -> int:
    """Parameters of GLM's last layer, which the count of its checkpoints has in it.

    One more layer, three norms, a matrix that joins state and next token, both embeddings again.
    """
    if family_of(config).model_type != "glm4_moe":
        return 0
    one, two = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(shorter)[1]))
        for shorter in (shortened(config, 1), shortened(config, 2))
    )
    width = config.hidden_size
    return two - one + 3 * width + 2 * width**2 + 2 * config.vocab_size * width


def shortened(config: DecoderConfig, mixtures: int) -> DecoderConfig:
    fields = config.to_json()
    fields["num_layers"] = config.dense_layers + mixtures
    return DecoderConfig.from_json(fields)


def test_numbers_of_presets_are_those_transformers_publishes() -> None:
    """What its config classes take as the model they are named after, where they say so."""
    air = transformers.Glm4MoeConfig()
    config, moe = PRESETS["glm45_air"], PRESETS["glm45_air"].moe
    assert isinstance(moe, MoeConfig)
    assert (config.vocab_size, config.hidden_size) == (air.vocab_size, air.hidden_size)
    assert (config.num_layers, config.num_heads) == (air.num_hidden_layers, air.num_attention_heads)
    assert (config.intermediate_size, config.norm_eps) == (air.intermediate_size, air.rms_norm_eps)
    assert (moe.num_experts, moe.expert_size) == (air.n_routed_experts, air.moe_intermediate_size)
    assert (moe.top_k, moe.dense_layers) == (air.num_experts_per_tok, air.first_k_dense_replace)
    assert PRESETS["llama3_8b"].rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
