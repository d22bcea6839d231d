"""Where every array lives: the one place that turns names of dimensions into mesh axes.

Model code names the dimensions of its activations (`constrain(x, "batch", "length", "embed")`);
parameters are recognised by their path. What a name means under a mesh is said by `ShardingRules`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from klong_jax.core.errors import UserError

Axes = tuple[str, ...]
AnyMesh = Mesh | AbstractMesh


@dataclass(frozen=True)
class ShardingRules:
    """The mesh axes over which each named dimension is spread.

    Activations follow the tokens: rows over data, fsdp and expert, positions over context. So every
    device works on tokens of its own, and weights travel to the tokens: those of a layer are
    gathered when it runs and let go after it (ZeRO-3). Only what tensor and expert cut stays cut
    while it is used.

    Attributes:
        batch: Windows, or sequences that are served.
        length: Positions of a window.
        cache_length: Positions of a key-value cache.
        embed: The residual stream's width.
        heads: Query heads.
        kv_heads: Key and value heads.
        mlp: Columns of the MLP.
        vocab: Rows of the embeddings.
        experts: Experts of a mixture.
        stored_embed: The width dimension of stored weights, gathered when they are used.
        stored_expert_embed: The same of experts' weights; expert is taken by the experts.
    """

    batch: Axes = ("data", "fsdp", "expert")
    length: Axes = ("context",)
    cache_length: Axes = ("context",)
    embed: Axes = ()
    heads: Axes = ("tensor",)
    kv_heads: Axes = ("tensor",)
    mlp: Axes = ("tensor",)
    vocab: Axes = ("tensor",)
    experts: Axes = ("expert",)
    stored_embed: Axes = ("fsdp", "expert", "context")
    stored_expert_embed: Axes = ("fsdp", "context")


TRAINING = ShardingRules()
"""Of training."""

SERVING = ShardingRules(length=(), stored_embed=(), stored_expert_embed=())
"""Of prefill and decoding: few tokens meet every weight at each step, so weights stay where they
are, whole but for tensor and expert; fsdp is one more way to spread sequences."""

# Last names of a parameter's path -> names of its last dimensions; the first that fits holds. What
# stands before them is the stack of layers, never cut. What is not named here is replicated.
_PARAMETERS: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("experts", "gate", "kernel"): ("experts", "stored_expert_embed", "mlp"),
    ("experts", "up", "kernel"): ("experts", "stored_expert_embed", "mlp"),
    ("experts", "down", "kernel"): ("experts", "mlp", "stored_expert_embed"),
    ("router", "kernel"): ("stored_embed", None),
    ("embedding",): ("vocab", "stored_embed"),
    ("unembedding",): ("vocab", "stored_embed"),
    ("query", "kernel"): ("stored_embed", "heads"),
    ("key", "kernel"): ("stored_embed", "kv_heads"),
    ("value", "kernel"): ("stored_embed", "kv_heads"),
    ("query", "bias"): ("heads",),
    ("key", "bias"): ("kv_heads",),
    ("value", "bias"): ("kv_heads",),
    ("output", "kernel"): ("heads", "stored_embed"),
    ("gate", "kernel"): ("stored_embed", "mlp"),
    ("up", "kernel"): ("stored_embed", "mlp"),
    ("down", "kernel"): ("mlp", "stored_embed"),
}
# The factors of an adapter lie as the matrix beside them; their rank is never cut.
for _name in ("query", "key", "value", "output", "gate", "up", "down"):
    _inputs, _outputs = _PARAMETERS[_name, "kernel"]
    _PARAMETERS[_name, "lora", "lora_a"] = (_inputs, None)
    _PARAMETERS[_name, "lora", "lora_b"] = (None, _outputs)

_rules: Any = jax.make_user_context(TRAINING)


@contextmanager
def use_mesh(mesh: Mesh, rules: ShardingRules = TRAINING) -> Iterator[None]:
    """Makes a mesh and its rules the ones that `constrain` follows; programs are traced anew."""
    with jax.set_mesh(mesh), _rules(rules):
        yield


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Fixes where an activation lives, by the names of its dimensions; None leaves one whole.

    Without a mesh it changes nothing. Inside a shard_map the axes that are mapped are left out.

    Raises:
        UserError: The mesh does not divide a dimension; names both.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} names for an array of shape {x.shape}")
    return jax.lax.with_sharding_constraint(x, named_spec(x.shape, names, mesh, active_rules()))


def active_rules() -> ShardingRules:
    """The rules of the innermost `use_mesh`."""
    rules: ShardingRules = _rules.value
    return rules


def param_specs(
    params: Any, mesh: AnyMesh | None = None, rules: ShardingRules | None = None
) -> Any:
    """The PartitionSpec of every parameter, from its path alone.

    A tree that holds parameters under their paths, such as an optimiser's state, is as good.

    Args:
        params: Arrays or their shapes.
        mesh: Checked against; the active one if not given.
        rules: The active ones if not given.

    Raises:
        UserError: The mesh does not divide a parameter; names dimension, size and axes.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    rules = active_rules() if rules is None else rules

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        where = _names(path)
        found = next((d for end, d in _PARAMETERS.items() if where[-len(end) :] == end), ())
        if len(found) > len(leaf.shape):
            return PartitionSpec()
        names = (*(None,) * (len(leaf.shape) - len(found)), *found)
        return named_spec(leaf.shape, names, mesh, rules, ".".join(where))

    return jax.tree_util.tree_map_with_path(spec, params)


def param_shardings(params: Any, mesh: Mesh, rules: ShardingRules = TRAINING) -> Any:
    """`param_specs` on a mesh: what `device_put`, `jit` and a restored checkpoint take."""
    specs = param_specs(params, mesh, rules)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def constrain_params(tree: Any) -> Any:
    """Fixes where parameters live, or anything that holds them; without a mesh changes nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, param_specs(tree))


def placed(tree: Any) -> Any:
    """The shapes of parameters, or of anything that holds them, and where they would live."""
    mesh = jax.sharding.get_mesh()

    def place(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        where: jax.sharding.Sharding
        if mesh.empty:
            where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        else:
            where = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(place, tree, param_specs(tree))


def array_sharding(
    shape: tuple[int, ...], names: tuple[str | None, ...], what: str = "a batch"
) -> NamedSharding | None:
    """Where an array with named dimensions lives on the active mesh; None without a mesh."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return None
    return NamedSharding(mesh, named_spec(shape, names, mesh, active_rules(), what))


def rounded_up(size: int, name: str) -> int:
    """The least number from `size` on that the active mesh divides along a named dimension."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    parts = prod(sizes.get(axis, 1) for axis in getattr(active_rules(), name))
    return -(-size // parts) * parts


def spread(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts an array that every process holds where it belongs; each sends its own devices' part."""
    held = np.asarray(value)
    return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])


def named_spec(
    shape: tuple[int, ...],
    names: tuple[str | None, ...],
    mesh: AnyMesh,
    rules: ShardingRules,
    what: str = "an activation",
) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have names.

    Raises:
        UserError: The mesh does not divide a dimension.
    """
    sizes = {
        axis: size
        for axis, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if size > 1 and kind != AxisType.Manual
    }
    parts: list[Axes | None] = []
    for dimension, (size, name) in enumerate(zip(shape, names, strict=True)):
        axes = tuple(axis for axis in (getattr(rules, name) if name else ()) if axis in sizes)
        if size % prod(sizes[axis] for axis in axes):
            over = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes)
            raise UserError(
                f"mesh: {over} does not divide dimension {dimension} ({name}, size {size}) of "
                f"{what}; choose sizes whose product divides it."
            )
        parts.append(axes or None)
    return PartitionSpec(*parts)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names on a path; positions in tuples and the box around a variable are no names."""
    names: list[str] = []
    for key in path:
        if isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, str):
            names.append(key.key)
    return tuple(names)
