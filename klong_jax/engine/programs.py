"""The two compiled programs of generation: appending prompt tokens, and sampling.

Both have one shape for the life of an engine. Rows never look at each other, so what a row samples
depends on its own tokens and key alone, whatever its neighbours do and whenever they arrive.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from klong_jax.models.decoder import Cache, Decoder, Params

CACHE_DIMENSIONS = (None, "batch", "cache_length", "kv_heads", None)
"""Names of a cache's dimensions, which say where it lives."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["token", "position", "left", "key", "drawn"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Rows:
    """Where each row of the batch stands.

    Attributes:
        token: The last token, not yet in the cache.
        position: Its position.
        left: Tokens the row may still sample; 0 for an idle row.
        key: Key data of the row's turn.
        drawn: Tokens sampled in this turn so far.
    """

    token: Int[Array, " b"]
    position: Int[Array, " b"]
    left: Int[Array, " b"]
    key: UInt32[Array, "b 2"]
    drawn: Int[Array, " b"]


Prefill = Callable[[Params, Cache, Int[Array, "b t"], Int[Array, "b t"]], Cache]
Sample = Callable[
    [Params, Cache, Rows],
    tuple[Cache, Rows, Int[Array, "n b"], Float[Array, "n b"], Bool[Array, "n b"]],
]


def compile_programs(
    graph: nnx.GraphDef[Decoder], *, end_id: int, temperature: float, steps: int
) -> tuple[Prefill, Sample]:
    """Builds the programs.

    Args:
        graph: The decoder.
        end_id: The token that ends a turn.
        temperature: Of the sampling; 0 takes the likeliest token.
        steps: Tokens a call of the sampling program.

    Returns:
        `prefill(params, cache, tokens, positions)` and `sample(params, cache, rows)`, which
        returns cache, rows, and tokens, log-probabilities and whether each was sampled.
    """

    @partial(jax.jit, donate_argnums=1)
    def prefill(params: Params, cache: Cache, tokens: Array, positions: Array) -> Cache:
        return nnx.merge(graph, params).extend(tokens, positions, cache)[1]

    @partial(jax.jit, donate_argnums=1)
    def sample(params: Params, cache: Cache, rows: Rows) -> Any:
        decoder = nnx.merge(graph, params)

        def step(carry: tuple[Cache, Rows], _: None) -> tuple[tuple[Cache, Rows], Any]:
            cache, rows = carry
            active = rows.left > 0
            nowhere = cache[0].shape[2]
            position = jnp.where(active, rows.position, nowhere)[:, None]
            hidden, cache = decoder.extend(rows.token[:, None], position, cache)
            logits = jnp.matmul(
                hidden[:, 0], decoder.output_embedding.T, preferred_element_type=jnp.float32
            )
            if temperature > 0:
                logits = logits / temperature
                keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows.key), rows.drawn)
                token = jax.vmap(jax.random.categorical)(keys, logits)
            else:
                token = jnp.argmax(logits, axis=-1)
            logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
            token = jnp.where(active, token, rows.token)
            left = jnp.where(active & (token != end_id), rows.left - 1, 0)
            rows = Rows(token, rows.position + active, left, rows.key, rows.drawn + active)
            return (cache, rows), (token, logprob, active)

        (cache, rows), (tokens, logprobs, sampled) = jax.lax.scan(
            step, (cache, rows), None, length=steps
        )
        return cache, rows, tokens, logprobs, sampled

    return prefill, sample
