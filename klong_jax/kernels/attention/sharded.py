"""Attention under the active mesh: each device takes its rows and heads, and its part of a window.

A window that is spread over the context axis is cut in twice as many chunks as there are devices,
and device i takes chunks i and 2n - 1 - i: early queries see few keys and late ones many, so every
device has the same work. Keys and values are gathered; only they and two halves of the queries
travel, and their gradients back.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from klong_jax.core.errors import UserError
from klong_jax.kernels.attention.mask import WindowMask
from klong_jax.kernels.placement import Axes, axes_of
from klong_jax.parallel.rules import active_rules, named_spec

Backend = Callable[[Array, Array, Array, WindowMask, float], Array]


def attention(
    backend: Backend,
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k d"],
    mask: WindowMask,
    scale: float,
) -> Float[Array, "b t h d"]:
    """Attends on every device with a backend; the result does not depend on the mesh.

    Raises:
        UserError: The mesh does not divide a dimension.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), active_rules()
    spec = partial(named_spec, mesh=mesh, rules=rules)
    q_spec = spec(query.shape, ("batch", "length", "heads", None), what="the queries")
    kv_spec = spec(key.shape, ("batch", "length", "kv_heads", None), what="the keys")
    if q_spec[2] != kv_spec[2]:
        raise UserError("mesh: queries' and keys' heads must be spread over the same axes.")
    rows = jax.tree.map(lambda _: PartitionSpec(q_spec[0]), mask)
    context = axes_of(q_spec[1])
    devices = prod(mesh.shape[axis] for axis in context)
    if query.shape[1] % (2 * devices) and context:
        raise UserError(
            f"mesh: a window of {query.shape[1]} tokens is cut in two chunks for each of the "
            f"{devices} devices of mesh.context; choose a multiple of {2 * devices}."
        )

    def local(query: Array, key: Array, value: Array, mask: WindowMask) -> Array:
        if not context:
            return backend(query, key, value, mask, scale)
        key, value = (jax.lax.all_gather(x, context, axis=1, tiled=True) for x in (key, value))
        positions = _positions(query.shape[1], context, devices)
        here = replace(mask, positions=positions)
        out = backend(_deal(query, context, devices), key, value, here, scale)
        return _collect(out, context, devices)

    mapped: Any = jax.shard_map(
        local, in_specs=(q_spec, kv_spec, kv_spec, rows), out_specs=q_spec, check_vma=False
    )
    result: Array = mapped(query, key, value, mask)
    return result


def _owners(devices: int) -> list[int]:
    """The device that each chunk of a window goes to."""
    return [min(chunk, 2 * devices - 1 - chunk) for chunk in range(2 * devices)]


def _positions(tokens: int, context: Axes, devices: int) -> Int[Array, "t"]:
    """Where the dealt queries of this device stand in the window: an even chunk, an odd one."""
    device = jax.lax.axis_index(context)
    mirrored = 2 * devices - 1 - device
    odd = device % 2
    chunks = jnp.stack([jnp.where(odd, mirrored, device), jnp.where(odd, device, mirrored)])
    size = tokens // 2
    return (chunks[:, None] * size + jnp.arange(size)).reshape(-1)


def _deal(x: Float[Array, "b t h d"], context: Axes, devices: int) -> Array:
    """From neighbouring chunks 2i and 2i + 1 on device i to those that it works on."""
    owners = _owners(devices)
    halves = jnp.split(x, 2, axis=1)
    moves = [[(i, owners[2 * i + half]) for i in range(devices)] for half in range(2)]
    pieces = map(lambda part, move: jax.lax.ppermute(part, context, move), halves, moves)
    return jnp.concatenate(list(pieces), axis=1)


def _collect(x: Float[Array, "b t h d"], context: Axes, devices: int) -> Array:
    """The inverse of `_deal`."""
    owners = _owners(devices)
    halves = jnp.split(x, 2, axis=1)
    moves = [[(owners[2 * i + half], i) for i in range(devices)] for half in range(2)]
    pieces = map(lambda part, move: jax.lax.ppermute(part, context, move), halves, moves)
    return jnp.concatenate(list(pieces), axis=1)
