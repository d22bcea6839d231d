"""A loss over windows: how hidden states come about, whatever is then asked of them.

An `Objective` sees hidden states beside the tokens that they predict and sums; SFT and RL are one
each. `WindowLoss` runs the decoder for it: over whole windows, or over a prefix and then over
windows that follow it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from klong_jax.models.config import Remat
from klong_jax.models.decoder import Cache, Decoder, Loads, Params
from klong_jax.models.routing import EXPERT_LOADS
from klong_jax.training.batches import WindowBatch, real_tokens

Logs = dict[str, Array]
Summed = tuple[Float[Array, ""], Logs]
"""Sum of the loss, and sums of what is worth logging, mostly scalars."""

Objective = Callable[[Float[Array, "b t w"], Float[Array, "v w"], WindowBatch], Summed]
"""From hidden states, the output embedding and the tokens that the hidden states predict."""


class Prefix(NamedTuple):
    """What windows need of the prefix before them.

    Attributes:
        cache: Keys and values of each layer and token.
        last: The last token's final hidden state, which predicts a window's first token.
    """

    cache: Cache
    last: Float[Array, "b 1 w"]


@dataclass(frozen=True)
class WindowLoss:
    """Sums an objective over the tokens of windows.

    Attributes:
        graph: The decoder.
        objective: What is asked of each token.
        remat: What each layer keeps for the backward pass.
        scan_layers: Whether layers are one compiled loop. Compiled one by one they take longer to
            compile, and on GPUs a step takes less time: no layer's results are copied.
    """

    graph: nnx.GraphDef[Decoder]
    objective: Objective
    remat: Remat
    scan_layers: bool = True

    def __call__(self, params: Params, batch: WindowBatch) -> Summed:
        """Of whole windows."""
        decoder: Decoder = nnx.merge(self.graph, params)
        out = decoder.forward(
            jnp.asarray(batch.tokens),
            remat=self.remat,
            scan=self.scan_layers,
            counted=real_tokens(batch),
            segments=None if batch.segments is None else jnp.asarray(batch.segments),
        )
        value, logs = self.objective(out.hidden, decoder.output_embedding, next_tokens(batch))
        return value, _with_loads(logs, out.loads)

    def read(
        self, params: Params, prefix: WindowBatch, *, trained: bool
    ) -> tuple[tuple[Prefix, Float[Array, ""]], Logs]:
        """Of a prefix, which is all real tokens; and what the windows after it need.

        Args:
            params: The decoder's.
            prefix: Its tokens; a last one predicts nothing here.
            trained: Whether any of them is trained; if not, none is predicted.
        """
        decoder: Decoder = nnx.merge(self.graph, params)
        tokens = jnp.asarray(prefix.tokens)
        real = jnp.broadcast_to(jnp.asarray(prefix.weight)[:, None] != 0, tokens.shape)
        out = decoder.forward(
            tokens, keep=True, remat=self.remat, scan=self.scan_layers, counted=real
        )
        assert out.cache is not None
        asked = out.hidden, decoder.output_embedding, next_tokens(prefix)
        if trained:
            value, logs = self.objective(*asked)
        else:
            value, logs = jax.tree.map(jnp.zeros_like, jax.eval_shape(self.objective, *asked))
        state = Prefix(out.cache, out.hidden[:, -1:])
        return (state, value), _with_loads(logs, out.loads)

    def after(self, params: Params, prefix: Prefix, batch: WindowBatch) -> Summed:
        """Of windows after a prefix."""
        decoder: Decoder = nnx.merge(self.graph, params)
        out = decoder.forward(
            jnp.asarray(batch.tokens),
            past=prefix.cache,
            remat=self.remat,
            scan=self.scan_layers,
            counted=real_tokens(batch),
        )
        # Each token is predicted by the hidden state before it, the first by the prefix's last.
        before = jnp.concatenate([prefix.last, out.hidden[:, :-1]], axis=1)
        value, logs = self.objective(before, decoder.output_embedding, batch)
        return value, _with_loads(logs, out.loads)


def next_tokens(batch: WindowBatch) -> WindowBatch:
    """The token after each, at no weight where there is none.

    Rows stay whole, so that lengths stay even and divisible.
    """

    def shift(field: Array) -> Array:
        return jnp.pad(jnp.asarray(field)[:, 1:], ((0, 0), (0, 1)))

    if batch.segments is None:
        shifted: WindowBatch = jax.tree.map(shift, replace(batch, weight=None))
        return replace(shifted, weight=batch.weight)
    shifted = jax.tree.map(shift, batch)
    # The last token of a window does not predict the first of the next one in its row.
    return replace(shifted, trained=shifted.trained * (shifted.segments == batch.segments))


def _with_loads(logs: Logs, loads: Loads) -> Logs:
    return logs if loads is None else {**logs, EXPERT_LOADS: loads}
