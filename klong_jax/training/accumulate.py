"""A training step over any number of windows with one compiled program.

A loss only *sums* over its windows; the caller divides by a denominator known on the host. So
micro-batches add up exactly, however the windows were cut, padded or ordered.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from klong_jax.models.decoder import Params
from klong_jax.models.routing import EXPERT_LOADS, balance_routers, load_statistics
from klong_jax.parallel.rules import constrain_params, placed
from klong_jax.training.batches import SharedBatch, WindowBatch, place_batch
from klong_jax.training.frozen import EVERYTHING, Selection, joined
from klong_jax.training.loss import Summed, WindowLoss
from klong_jax.training.offload import InPlace, Offloaded, Optimizer, on_host, take_step
from klong_jax.training.shared_prefix import SharedPrefixGradient


@partial(
    jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step"], meta_fields=[]
)
@dataclass(frozen=True)
class TrainState:
    """What an optimiser step changes.

    Attributes:
        params: The model's parameters.
        opt_state: The optimiser's state, of the parameters that are learnt.
        step: Steps taken, int32.
    """

    params: Params
    opt_state: Any
    step: Array


def init_state(
    params: Params, optimizer: Optimizer, selection: Selection = EVERYTHING
) -> TrainState:
    """A fresh state around parameters, spread as they are.

    Raises:
        UserError: The selection fits no parameter, or leaves nothing to learn.
    """

    @jax.jit
    def start(learnt: Params) -> Any:
        return constrain_params((optimizer.init(learnt), jnp.zeros((), jnp.int32)))

    selection.check(params)
    return TrainState(params, *start(selection.split(params)[0]))


def abstract_state(
    params: Params, optimizer: Optimizer, selection: Selection = EVERYTHING
) -> TrainState:
    """The shapes of a state and where they would live: takes no memory.

    Args:
        params: Parameters or their shapes.
        optimizer: The optimiser.
        selection: Which parameters are learnt.
    """
    init = partial(init_state, optimizer=optimizer, selection=selection)
    state: TrainState = placed(jax.eval_shape(init, params))
    if isinstance(optimizer, Offloaded):
        return replace(state, opt_state=on_host(state.opt_state))
    return state


class Trainer:
    """Accumulates gradients over micro-batches and applies one update.

    A loss of a model with experts logs how many tokens each took; a step turns that into statistics
    and, at a `router_bias_rate` above 0, moves the routers' biases against it, if they are learnt.

    Attributes:
        selection: Which parameters are learnt; all sums of gradients are of these.
        start: Sums of nothing: zero gradients and logs for parameters and a micro-batch.
        accumulate: Adds a micro-batch's gradients and logs to the sums.
        shared: The same for windows whose prefix is computed once.
        update: Takes an optimiser step with the summed gradients; its state has learnt parameters
            only.
    """

    def __init__(
        self,
        loss: WindowLoss,
        optimizer: Optimizer,
        router_bias_rate: float = 0.0,
        selection: Selection = EVERYTHING,
    ) -> None:
        def joined_loss(learnt: Params, frozen: Params, batch: WindowBatch) -> Summed:
            return loss(joined(learnt, frozen), batch)

        @jax.jit
        def start(learnt: Params, frozen: Params, batch: WindowBatch) -> Any:
            value, logs = jax.eval_shape(joined_loss, learnt, frozen, batch)
            zeros, sums = jax.tree.map(jnp.zeros_like, (learnt, {"loss": value, **logs}))
            return constrain_params(zeros), sums

        @partial(jax.jit, donate_argnums=2)
        def accumulate(learnt: Params, frozen: Params, total: Any, batch: WindowBatch) -> Any:
            gradient = jax.value_and_grad(joined_loss, has_aux=True)
            (value, logs), grads = gradient(learnt, frozen, batch)
            total, sums = jax.tree.map(jnp.add, total, (grads, {"loss": value, **logs}))
            return constrain_params(total), sums

        def update(state: TrainState, grads: Params, scale: Array) -> tuple[TrainState, Array]:
            grads = jax.tree.map(lambda grad: grad * scale, grads)
            params, opt_state = take_step(optimizer, grads, state.opt_state, state.params)
            state = constrain_params(TrainState(params, opt_state, state.step + 1))
            return state, optax.tree.norm(grads)

        @partial(jax.jit, donate_argnums=0)
        def balance(params: Params, loads: Array) -> Params:
            return constrain_params(balance_routers(params, loads, router_bias_rate))

        self.selection = selection
        self.start, self.accumulate = start, accumulate
        held = isinstance(optimizer, Offloaded)
        self.update = InPlace(update) if held else jax.jit(update, donate_argnums=0)
        self.shared = SharedPrefixGradient(loss)
        self._balance = balance if router_bias_rate > 0 else None

    def add(self, params: Params, total: Any, batch: WindowBatch | SharedBatch) -> Any:
        """The sums of gradients and logs with a micro-batch's added; None is a sum of nothing."""
        parts = self.selection.split(params)
        if isinstance(batch, SharedBatch):
            if total is None:
                total = self.start(*parts, place_batch(batch.windows[0]))
            return self.shared.add(*parts, total, batch)
        batch = place_batch(batch)
        if total is None:
            total = self.start(*parts, batch)
        return self.accumulate(*parts, total, batch)

    def step(
        self,
        state: TrainState,
        batches: Iterable[WindowBatch | SharedBatch],
        denominator: float,
    ) -> tuple[TrainState, dict[str, float]]:
        """Takes one optimiser step.

        Args:
            state: The state; its buffers are reused, but for those of frozen parameters.
            batches: Micro-batches: of whole windows, or of windows that share a prefix.
            denominator: What the summed loss is divided by.

        Returns:
            The new state, and the sums of the loss and its logs divided by the denominator,
            with `grad_norm`.
        """
        total: Any = None
        for batch in batches:
            total = self.add(state.params, total, batch)
        if total is None:
            raise ValueError("a step needs at least one micro-batch")
        grads, logs = total
        learnt, frozen = self.selection.split(state.params)
        state = replace(state, params=learnt)
        state, norm = self.update(state, grads, np.float32(1.0 / denominator))
        loads = logs.pop(EXPERT_LOADS, None)
        scaled = {name: float(value) / denominator for name, value in logs.items()}
        if loads is not None:
            scaled |= {name: float(value) for name, value in load_statistics(loads).items()}
            if self._balance:
                state = replace(state, params=self._balance(state.params, loads))
        state = replace(state, params=joined(state.params, frozen))
        return state, {**scaled, "grad_norm": float(norm)}
