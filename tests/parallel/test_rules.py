"""Names of dimensions become mesh axes, parameters are known by their path, misfits are named."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from klong_jax.core.errors import UserError
from klong_jax.parallel.mesh import AXES, MeshShape, make_mesh
from klong_jax.parallel.rules import (
    TRAINING,
    ShardingRules,
    constrain,
    named_spec,
    param_specs,
    rounded_up,
    use_mesh,
)


def abstract_mesh(shape: MeshShape) -> AbstractMesh:
    return AbstractMesh(shape.sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_parameters_are_spread_by_their_path_wherever_they_stand() -> None:
    params = {
        "embedding": parameter(64, 16),
        "blocks": {
            "query": {"kernel": parameter(2, 16, 32), "bias": parameter(2, 32)},
            "value": {"kernel": parameter(2, 16, 8)},
            "down": {"kernel": parameter(2, 64, 16)},
            "mlp_norm": {"scale": parameter(2, 16)},
        },
    }
    mesh = abstract_mesh(MeshShape(fsdp=2, context=4, tensor=2))
    specs = param_specs({"mu": params, "count": parameter()}, mesh, TRAINING)
    stored = ("fsdp", "context")
    assert specs["count"] == PartitionSpec()
    assert specs["mu"] == {
        "embedding": PartitionSpec(("tensor",), stored),
        "blocks": {
            "query": {
                "kernel": PartitionSpec(None, stored, ("tensor",)),
                "bias": PartitionSpec(None, ("tensor",)),
            },
            "value": {"kernel": PartitionSpec(None, stored, ("tensor",))},
            "down": {"kernel": PartitionSpec(None, ("tensor",), stored)},
            "mlp_norm": {"scale": PartitionSpec(None, None)},
        },
    }


def test_a_mesh_that_does_not_divide_the_model_is_named() -> None:
    params = {"blocks": {"key": {"kernel": parameter(2, 16, 6)}}}
    with pytest.raises(UserError) as caught:
        param_specs(params, abstract_mesh(MeshShape(tensor=4)), TRAINING)
    assert str(caught.value) == (
        "mesh: mesh.tensor=4 does not divide dimension 2 (kv_heads, size 6) of blocks.key.kernel; "
        "choose sizes whose product divides it."
    )
    with pytest.raises(UserError, match=r"mesh\.fsdp=3 x mesh\.context=2 .* \(stored_embed, size"):
        param_specs(params, abstract_mesh(MeshShape(fsdp=3, context=2)), TRAINING)


def test_a_mesh_takes_all_devices() -> None:
    count = len(jax.devices())
    assert make_mesh(MeshShape(data=count)).shape == dict.fromkeys(AXES, 1) | {"data": count}
    with pytest.raises(UserError, match=rf"fsdp {count + 1} takes {count + 1} devices, but there"):
        make_mesh(MeshShape(fsdp=count + 1))
    with pytest.raises(UserError, match=r"mesh\.tensor=0"):
        MeshShape(tensor=0)


def test_activations_follow_the_rules_but_not_over_mapped_axes() -> None:
    names = ("batch", "length", "embed")
    mesh = abstract_mesh(MeshShape(fsdp=4, context=2))
    kinds = (AxisType.Manual if axis == "context" else AxisType.Auto for axis in AXES)
    mapped = AbstractMesh(mesh.axis_sizes, AXES, axis_types=tuple(kinds))
    other = ShardingRules(length=(), embed=("context",))
    assert named_spec((8, 4, 16), names, mesh, TRAINING) == PartitionSpec("fsdp", "context", None)
    assert named_spec((8, 4, 16), names, mesh, other) == PartitionSpec("fsdp", None, "context")
    assert named_spec((8, 4, 16), names, mapped, TRAINING) == PartitionSpec("fsdp", None, None)


def test_sizes_are_rounded_up_to_what_devices_share() -> None:
    assert rounded_up(3, "batch") == 3
    with jax.sharding.use_abstract_mesh(abstract_mesh(MeshShape(data=2, fsdp=4, tensor=2))):
        assert [rounded_up(size, "batch") for size in (1, 8, 9)] == [8, 8, 16]
        assert rounded_up(5, "heads") == 6


def test_without_a_mesh_nothing_is_constrained() -> None:
    x = jnp.ones((3, 5))
    assert constrain(x, "batch", "length") is x
    with use_mesh(make_mesh(MeshShape(), jax.devices()[:1])):
        assert constrain(x, "batch", "length") is x
