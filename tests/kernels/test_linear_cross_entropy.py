"""Chunked log-probabilities against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klong_jax.kernels.linear_cross_entropy import token_logprobs


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_values_and_gradients_equal_the_plain_formula(chunk: int) -> None:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 13, 8)), jnp.float32)
    embedding = jnp.asarray(rng.normal(size=(31, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 31, (2, 13)))
    weights = jnp.asarray(rng.normal(size=(2, 13)), jnp.float32)

    def plain(hidden: jax.Array, embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs = jax.nn.log_softmax(hidden @ embedding.T)
        chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
        return chosen, -(jnp.exp(logprobs) * logprobs).sum(-1)

    def chunked(hidden: jax.Array, embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
        return token_logprobs(hidden, embedding, targets, chunk=chunk)

    for got, want in zip(chunked(hidden, embedding), plain(hidden, embedding), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    def summed(fn: object) -> object:
        return lambda h, e: sum((weights * part).sum() for part in fn(h, e))

    got = jax.grad(summed(chunked), argnums=(0, 1))(hidden, embedding)
    want = jax.grad(summed(plain), argnums=(0, 1))(hidden, embedding)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
