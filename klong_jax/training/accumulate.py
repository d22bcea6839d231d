"""A training step over any number of windows with one compiled program.

A loss only *sums* over its windows; the caller divides by a denominator known on the host. So
micro-batches add up exactly, however the windows were cut, padded or ordered.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from klong_jax.models.decoder import Params

Batch = Any
# Sum of the loss over a micro-batch, and sums of what is worth logging.
LossFn = Callable[[Params, Batch], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


@partial(
    jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step"], meta_fields=[]
)
@dataclass(frozen=True)
class TrainState:
    """What an optimiser step changes.

    Attributes:
        params: The model's parameters.
        opt_state: The optimiser's state.
        step: Steps taken, int32.
    """

    params: Params
    opt_state: Any
    step: Array


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around parameters."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


class Trainer:
    """Accumulates gradients over micro-batches and applies one update."""

    def __init__(self, loss: LossFn, optimizer: optax.GradientTransformation) -> None:
        @partial(jax.jit, donate_argnums=1)
        def accumulate(params: Params, total: Any, batch: Batch) -> Any:
            (value, logs), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
            return jax.tree.map(jnp.add, total, (grads, {"loss": value, **logs}))

        @partial(jax.jit, donate_argnums=0)
        def update(state: TrainState, grads: Params, scale: Array) -> tuple[TrainState, Array]:
            grads = jax.tree.map(lambda grad: grad * scale, grads)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return TrainState(params, opt_state, state.step + 1), optax.tree.norm(grads)

        self._loss = loss
        self._logs: tuple[str, ...] = ()
        self._accumulate = accumulate
        self._update = update

    def step(
        self, state: TrainState, batches: Iterable[Batch], denominator: float
    ) -> tuple[TrainState, dict[str, float]]:
        """Takes one optimiser step.

        Args:
            state: The state; its buffers are reused.
            batches: Micro-batches of one shape.
            denominator: What the summed loss is divided by.

        Returns:
            The new state, and the sums of the loss and its logs divided by the denominator,
            with `grad_norm`.
        """
        total: Any = None
        for batch in batches:
            if total is None:
                # Traced once: tracing costs more than a small step.
                self._logs = self._logs or tuple(jax.eval_shape(self._loss, state.params, batch)[1])
                logs = {name: jnp.zeros(()) for name in ("loss", *self._logs)}
                total = (jax.tree.map(jnp.zeros_like, state.params), logs)
            total = self._accumulate(state.params, total, batch)
        if total is None:
            raise ValueError("a step needs at least one micro-batch")
        grads, logs = total
        state, norm = self._update(state, grads, jnp.float32(1.0 / denominator))
        scaled = {name: float(value) / denominator for name, value in logs.items()}
        return state, {**scaled, "grad_norm": float(norm)}
