"""Every family against transformers on torch CPU: logits, gradients and greedy generation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers_reference import CASES, double_precision, make_reference, on_disk

from klong_jax.engine.programs import Rows, compile_programs
from klong_jax.models.config import DecoderConfig, DTypes
from klong_jax.models.decoder import abstract, empty_cache
from klong_jax.models.families import family_of
from klong_jax.models.families.base import weights_from_hf, weights_to_hf

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 40))
Note = Callable[[str], None]


def params_of(model: torch.nn.Module, config: DecoderConfig, dtypes: DTypes) -> tuple:
    graph, params = abstract(config, dtypes)
    weights = on_disk(model, model.state_dict())
    return graph, weights_from_hf(params, weights, family_of(config).tensors(config))


def compare(config: DecoderConfig, dtypes: DTypes) -> tuple[float, float, float]:
    """Largest error of logits, of the loss, and of any tensor's gradient relative to its size."""
    model = make_reference(config, double=dtypes.compute == "float64")
    graph, params = params_of(model, config, dtypes)

    @jax.jit
    def loss(params: object) -> tuple[jax.Array, jax.Array]:
        decoder = nnx.merge(graph, params)
        logits = decoder.apply(jnp.asarray(TOKENS)) @ decoder.output_embedding.T
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(logprobs, jnp.asarray(TOKENS)[:, 1:, None], axis=-1)
        return -chosen.mean(), logits

    (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
    expected = model(torch.tensor(TOKENS)).logits
    targets = torch.tensor(TOKENS)[:, 1:].flatten()
    wanted = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), targets)
    wanted.backward()
    theirs = on_disk(model, {name: p.grad for name, p in model.named_parameters()})
    ours = weights_to_hf(grads, family_of(config).tensors(config))
    biases = {name for name in ours if name.endswith("e_score_correction_bias")}
    assert set(ours) - biases == set(theirs)
    assert all(not ours[name].any() for name in biases)
    # An expert that no token went to has no gradient on either side.
    errors = [
        np.abs(ours[name] - want).max() / (np.abs(want).max() or 1.0)
        for name, want in theirs.items()
    ]
    assert np.abs(expected.detach().numpy()).max() > 1
    return (
        float(np.abs(np.asarray(logits) - expected.detach().numpy()).max()),
        abs(float(value) - wanted.item()),
        float(max(errors)),
    )


@pytest.mark.parametrize("case", CASES)
def test_float32(case: str, measured: Note) -> None:
    logits, loss, grads = compare(CASES[case], DTypes())
    measured(f"float32  logits {logits:.1e}  gradients {grads:.1e}  {case}")
    assert logits < 2e-5
    assert loss < 1e-5
    assert grads < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_float64(case: str, measured: Note) -> None:
    with double_precision(CASES[case]), jax.enable_x64(True):
        logits, loss, grads = compare(CASES[case], DTypes("float64", "float64"))
    measured(f"float64  logits {logits:.1e}  gradients {grads:.1e}  {case}")
    assert logits < 1e-10
    assert loss < 1e-10
    assert grads < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_64_greedy_tokens(case: str, measured: Note) -> None:
    config, count, prompt = CASES[case], 64, TOKENS[:, :12]
    model = make_reference(config)
    wanted = model.generate(
        torch.tensor(prompt),
        attention_mask=torch.ones(prompt.shape),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()[:, prompt.shape[1] :]
    graph, params = params_of(model, config, DTypes())
    prefill, sample = compile_programs(graph, end_id=-1, temperature=0.0, steps=16)
    cache = empty_cache(config, 2, 80)
    positions = jnp.broadcast_to(jnp.arange(11), (2, 11))
    cache = prefill(params, cache, jnp.asarray(prompt[:, :-1], jnp.int32), positions)
    rows = Rows(
        jnp.asarray(prompt[:, -1], jnp.int32),
        jnp.full(2, 11),
        jnp.full(2, count),
        jnp.zeros((2, 2), jnp.uint32),
        jnp.zeros(2, jnp.int32),
    )
    got = []
    for _ in range(count // 16):
        cache, rows, tokens, _, sampled = sample(params, cache, rows)
        assert sampled.all()
        got.append(tokens)
    same = int((wanted == np.concatenate(got).T).all(axis=0).sum())
    measured(f"{same} of {count} greedy tokens  {case}")
    assert same == count
    assert len(set(wanted.flatten())) > 12, "a model that repeats itself shows nothing"
