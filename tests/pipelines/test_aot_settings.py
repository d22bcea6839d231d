"""The mesh's open axis takes what the others leave."""

import pytest

from klong_jax.core.errors import UserError
from klong_jax.parallel.mesh import MeshShape
from klong_jax.pipelines.config.pods import MeshSection


def section(**sizes: int) -> MeshSection:
    return MeshSection(**{"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1, **sizes})


def test_an_open_axis_is_filled() -> None:
    assert section(fsdp=0, context=16).shape(64) == MeshShape(fsdp=4, context=16)
    assert section(fsdp=2, tensor=2).shape(64) == MeshShape(fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"fsdp": 0, "tensor": 3}, "mesh.fsdp=0 cannot take what mesh.tensor=3 leaves of 64"),
        ({"fsdp": 0, "data": 0}, "mesh.data=0 and mesh.fsdp=0 cannot take what nothing leaves"),
    ],
)
def test_what_cannot_be_filled_is_named(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(UserError) as caught:
        section(**sizes).shape(64)
    assert said in str(caught.value)
