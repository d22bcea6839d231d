"""The gradient of windows that begin alike, with their common prefix computed once.

The prefix runs forward once and its keys and values stay. Window after window runs forward and
backward against them; what each asks of them, their cotangents, adds up. Then the prefix runs
backward once. That is the chain rule in another order, so the gradient is that of training each
window whole; memory is that of the prefix and one window, however many there are.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from klong_jax.models.decoder import Params
from klong_jax.parallel.rules import constrain, constrain_params
from klong_jax.training.batches import SharedBatch, WindowBatch, place_batch
from klong_jax.training.frozen import joined
from klong_jax.training.loss import Logs, Prefix, Summed, WindowLoss

Total = tuple[Params, Logs]
"""Sums so far of gradients, and of the loss and what it logs."""

_KEYS = (None, "batch", "length", "kv_heads", None)
_HIDDEN = ("batch", None, "embed")


@partial(jax.tree_util.register_dataclass, data_fields=["kept"], meta_fields=["places", "form"])
@dataclass(frozen=True)
class _Backward:
    """The way back through a prefix, less the parameters, which would be copied otherwise.

    Attributes:
        kept: What the forward pass keeps for it.
        places: For each of its leaves, which parameter it is; None if it is of `kept`.
        form: Makes it of its leaves.
    """

    kept: list[Any]
    places: tuple[int | None, ...]
    form: Any

    @classmethod
    def without(cls, params: tuple[Params, Params], backward: Any) -> "_Backward":
        number = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves(params))}
        leaves, form = jax.tree.flatten(backward)
        places = tuple(number.get(id(leaf)) for leaf in leaves)
        kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
        return cls(kept, places, form)

    def with_params(self, params: tuple[Params, Params]) -> Any:
        known, kept = jax.tree.leaves(params), iter(self.kept)
        leaves = [next(kept) if place is None else known[place] for place in self.places]
        return jax.tree.unflatten(self.form, leaves)


class SharedPrefixGradient:
    """Adds a micro-batch's gradients to a sum, by three programs of fixed shapes.

    Attributes:
        read: Runs the prefix forward; gives its state, sums of nothing for the state's cotangents,
            the loss and logs, and the way back.
        after: Runs one window forward and backward.
        back: Runs the prefix backward.
    """

    def __init__(self, loss: WindowLoss) -> None:
        @partial(jax.jit, static_argnames="trained")
        def read(learnt: Params, frozen: Params, prefix: WindowBatch, trained: bool) -> Any:
            def forward(learnt: Params) -> Any:
                return loss.read(joined(learnt, frozen), prefix, trained=trained)

            (state, value), backward, logs = jax.vjp(forward, learnt, has_aux=True)
            state = constrain_prefix(state)
            wanted = constrain_prefix(_zeros(state))
            way = _Backward.without((learnt, frozen), backward)
            return state, wanted, {"loss": value, **logs}, way

        @partial(jax.jit, donate_argnums=(3, 4))
        def after(
            learnt: Params,
            frozen: Params,
            state: Prefix,
            wanted: Prefix,
            total: Total,
            batch: WindowBatch,
        ) -> tuple[Prefix, Total]:
            def forward(learnt: Params, state: Prefix) -> Summed:
                return loss.after(joined(learnt, frozen), state, batch)

            gradient = jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)
            (value, logs), grads = gradient(learnt, state)
            grads, asked = grads
            wanted = jax.tree.map(lambda x, y: x + y.astype(x.dtype), wanted, asked)
            total = jax.tree.map(jnp.add, total, (grads, {"loss": value, **logs}))
            return constrain_prefix(wanted), (constrain_params(total[0]), total[1])

        @partial(jax.jit, donate_argnums=5)
        def back(
            learnt: Params,
            frozen: Params,
            backward: _Backward,
            state: Prefix,
            wanted: Prefix,
            total: Total,
            logs: Logs,
        ) -> Total:
            asked = jax.tree.map(lambda x, y: x.astype(y.dtype), wanted, state)
            pull = backward.with_params((learnt, frozen))
            (grads,) = pull((asked, jnp.ones_like(logs["loss"])))
            total = jax.tree.map(jnp.add, total, (grads, logs))
            return constrain_params(total[0]), total[1]

        self.read, self.after, self.back = read, after, back

    def add(self, learnt: Params, frozen: Params, total: Total, batch: SharedBatch) -> Total:
        """The sums with a micro-batch's added; the buffers of `total` are reused.

        Args:
            learnt: The parameters whose gradients are summed.
            frozen: The others.
            total: The sums so far.
            batch: The micro-batch.
        """
        prefix = place_batch(batch.prefix)
        state, wanted, logs, backward = self.read(learnt, frozen, prefix, trained=batch.trained)
        for window in batch.windows:
            wanted, total = self.after(learnt, frozen, state, wanted, total, place_batch(window))
        result: Total = self.back(learnt, frozen, backward, state, wanted, total, logs)
        return result


def constrain_prefix(state: Prefix) -> Prefix:
    """Fixes where a prefix lives: with its rows, heads and positions."""
    keys, values = (constrain(x, *_KEYS) for x in state.cache)
    return Prefix((keys, values), constrain(state.last, *_HIDDEN))


def _zeros(state: Prefix) -> Prefix:
    """For sums over windows, which many of 16 bits would lose."""
    zeros: Prefix = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), state
    )
    return zeros
