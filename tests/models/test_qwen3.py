"""The decoder against transformers' Qwen3 on torch CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from klong_jax.core.errors import UserError
from klong_jax.models import qwen3
from klong_jax.models.config import DecoderConfig
from klong_jax.models.decoder import build, empty_cache

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 17))


def reference(tie: bool) -> tuple[DecoderConfig, transformers.Qwen3ForCausalLM]:
    config = DecoderConfig(97, 48, 3, 6, 2, 10, 80, rope_theta=5e4, tie_embeddings=tie)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**qwen3.config_to_hf(config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return config, model.float().eval()


def weights(model: transformers.Qwen3ForCausalLM) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("tie", [True, False])
def test_logits_and_gradients_equal_transformers(tie: bool) -> None:
    config, model = reference(tie)
    graph, params = build(config, 0)
    params = qwen3.weights_from_hf(params, weights(model), config)

    def loss(params: object) -> tuple[jax.Array, jax.Array]:
        decoder = nnx.merge(graph, params)
        logits = decoder.apply(jnp.asarray(TOKENS)) @ decoder.output_embedding.T
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), jnp.asarray(TOKENS)[:, 1:, None], axis=-1
        )
        return -chosen.mean(), logits

    (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
    expected = model(torch.tensor(TOKENS), labels=torch.tensor(TOKENS))
    expected.loss.backward()
    np.testing.assert_allclose(logits, expected.logits.detach().numpy(), atol=2e-5)
    np.testing.assert_allclose(value, expected.loss.item(), rtol=1e-6)
    named = qwen3.weights_to_hf(grads, config)
    for name, parameter in model.named_parameters():
        got, want = named[name], parameter.grad.numpy()
        np.testing.assert_allclose(
            got, want, atol=2e-5 * max(1.0, np.abs(want).max()), err_msg=name
        )


@pytest.mark.parametrize("tie", [True, False])
def test_weights_survive_the_round_trip_bit_for_bit(tie: bool) -> None:
    config, model = reference(tie)
    _graph, params = build(config, 0)
    originals = weights(model)
    back = qwen3.weights_to_hf(qwen3.weights_from_hf(params, originals, config), config)
    missing = {"lm_head.weight"} if tie else set()
    assert set(originals) - set(back) == missing
    for name, value in back.items():
        np.testing.assert_array_equal(value, originals[name])


def test_a_cache_filled_in_ragged_pieces_gives_the_same_states() -> None:
    config, _ = reference(True)
    graph, params = build(config, 1)
    decoder = nnx.merge(graph, params)
    whole = decoder.apply(jnp.asarray(TOKENS))
    cache = empty_cache(config, 2, 20)
    # Row 0 takes 5 tokens and row 1 takes 9; padding stands outside the cache.
    positions = np.stack([np.r_[0:5, [20] * 4], np.arange(9)])
    tokens = np.take_along_axis(TOKENS, np.minimum(positions, 16), axis=1)
    first, cache = decoder.extend(jnp.asarray(tokens), jnp.asarray(positions), cache)
    positions = np.stack([np.arange(5, 17), np.r_[9:17, [20] * 4]])
    tokens = np.take_along_axis(TOKENS, np.minimum(positions, 16), axis=1)
    second, _ = decoder.extend(jnp.asarray(tokens), jnp.asarray(positions), cache)
    np.testing.assert_allclose(np.r_[first[0, :5], second[0]], whole[0], atol=1e-5)
    np.testing.assert_allclose(np.r_[first[1], second[1, :8]], whole[1], atol=1e-5)


def test_config_round_trip_and_refusal() -> None:
    config, model = reference(False)
    assert qwen3.config_from_hf(model.config.to_dict()) == config
    with pytest.raises(UserError, match="'llama'"):
        qwen3.config_from_hf({"model_type": "llama"})
    with pytest.raises(UserError, match="num_kv_heads"):
        DecoderConfig(97, 48, 3, 6, 4, 10, 80)
