"""An optimiser's state in the host's memory, which the device sees a piece at a time.

Parameter after parameter, and of stacked layers layer after layer, the state comes to the device,
takes part in the update there and goes back. What is computed is what the optimiser computes, but
in another program, of which XLA may round the last bit of a parameter differently.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import optax
from flax import nnx

from klong_jax.models.decoder import Params
from klong_jax.training.frozen import joined, restricted

HOST = "pinned_host"
"""The memory that the state is in."""

_Step = Callable[[Params, Any, Params], tuple[Params, Any]]


@dataclass(frozen=True)
class Offloaded:
    """An optimiser with its state in the host's memory (`pinned_host`).

    Attributes:
        clip: What is done to all gradients at once; has no state.
        rest: Updates each parameter, and each layer of a stack, from that alone.
    """

    clip: optax.GradientTransformation
    rest: optax.GradientTransformation

    def init(self, params: Params) -> Any:
        """The state of parameters; of it, only what is of no parameter stays on the device."""
        return _moved(self.rest.init(params), jax.memory.Space.Host)

    def step(self, grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
        """The parameters after an update, and the state."""
        grads, _ = self.clip.update(grads, optax.EmptyState(), params)
        before = state
        for path, _ in nnx.to_flat_state(params):
            part = nnx.split_state(params, lambda other, _, path=path: other == path, ...)[0]
            given = restricted(grads, part), _map(partial(restricted, part=part), before), part
            step = partial(_layerwise, self._step) if "blocks" in path[0] else self._step
            made, done = step(*given)
            params, state = joined(params, made), _map(joined, state, done)
        return params, state

    def _step(self, grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
        state = _moved(state, jax.memory.Space.Device)
        params, state = take_step(self.rest, grads, state, params)
        return params, _moved(state, jax.memory.Space.Host)


Optimizer: TypeAlias = optax.GradientTransformation | Offloaded


def take_step(
    optimizer: Optimizer, grads: Params, state: Any, params: Params
) -> tuple[Params, Any]:
    """Parameters and optimiser's state after an update."""
    if isinstance(optimizer, Offloaded):
        return optimizer.step(grads, state, params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


class InPlace:
    """A compiled update of a state each part of which stays in the memory that it is in.

    Said or not, parts go where the update puts them; but unless it is said, JAX may reuse the
    buffer of a moment on the host for a parameter of the same shape on the device.
    """

    def __init__(self, update: Callable[..., tuple[Any, Any]]) -> None:
        """Compiles on use.

        Args:
            update: Gives the new state first; the buffers of the old, its first argument, are
                reused.
        """
        self._update = update
        self._compiled: Any = None

    def __call__(self, state: Any, *others: Any) -> Any:
        """The new state, and what else the update gives."""
        return self._for(state)(state, *others)

    def lower(self, state: Any, *others: Any) -> Any:
        """The program, for the shapes and places of a state."""
        return self._for(state).lower(state, *others)

    def _for(self, state: Any) -> Any:
        if self._compiled is None:
            where = jax.tree.map(lambda leaf: leaf.sharding, state)
            self._compiled = jax.jit(self._update, donate_argnums=0, out_shardings=(where, None))
        return self._compiled


def on_host(state: Any) -> Any:
    """The shapes of an optimiser's state, but in the host's memory as `Offloaded` holds it."""
    make: Any = jax.ShapeDtypeStruct

    def there(leaf: Any) -> Any:
        return make(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(HOST))

    return _map(partial(jax.tree.map, there), state)


def _layerwise(step: _Step, grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
    """A step of one layer after another; what is of no parameter is the same for all layers."""
    nodes, structure = jax.tree.flatten(state, is_leaf=_of_params)

    def layer(_: None, given: Any) -> tuple[None, Any]:
        grads, params, own = given
        rest = iter(own)
        mixed = [next(rest) if _of_params(node) else node for node in nodes]
        return None, step(grads, jax.tree.unflatten(structure, mixed), params)

    own = [node for node in nodes if _of_params(node)]
    _, (made, after) = jax.lax.scan(layer, None, (grads, params, own))
    return made, _map(lambda node: node, after, other=lambda leaf: leaf[-1])


def _moved(state: Any, where: Any) -> Any:
    return _map(lambda node: jax.tree.map(lambda leaf: jax.device_put(leaf, where), node), state)


def _of_params(node: Any) -> bool:
    """Whether a part of an optimiser's state has an array a parameter, under its path."""
    return isinstance(node, nnx.State)


def _map(
    function: Callable[..., Any],
    *states: Any,
    other: Callable[..., Any] = lambda *leaves: leaves[-1],
) -> Any:
    """Maps what has an array a parameter by one function and the rest by another."""
    return jax.tree.map(
        lambda *nodes: (function if _of_params(nodes[0]) else other)(*nodes),
        *states,
        is_leaf=_of_params,
    )
