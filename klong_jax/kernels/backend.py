"""Which backend of a kernel runs: the one asked for, the one set, or the platform's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from klong_jax.core.errors import UserError

_HOPPER = ("H100", "H200", "H20", "H800")


@dataclass(frozen=True)
class Choice:
    """What holds for the kernels that are traced under it.

    Attributes:
        platform: What the programs are for ("cpu", "gpu" or "tpu"); the mesh's if None.
        backends: Kernel name and backend name, of kernels that shall not choose by platform.
    """

    platform: str | None = None
    backends: tuple[tuple[str, str], ...] = ()


# Part of the key of JAX's caches, so that another choice traces a program anew.
_choice: Any = jax.make_user_context(Choice())


@contextmanager
def use_kernels(platform: str | None = None, **backends: str) -> Iterator[None]:
    """Decides for the kernels traced inside.

    Args:
        platform: What the programs are for.
        backends: Kernel name to backend name, as in attention="reference".
    """
    before: Choice = _choice.value
    merged = {**dict(before.backends), **backends}
    with _choice(Choice(platform or before.platform, tuple(sorted(merged.items())))):
        yield


def device_kind() -> str:
    """The device that programs traced now are for; an active mesh may be of another machine's."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return str(jax.devices()[0].device_kind)
    return str(mesh.abstract_device.device_kind)


def platform() -> str:
    """What programs traced now are for: "cpu", "gpu" or "tpu"."""
    choice: Choice = _choice.value
    if choice.platform:
        return choice.platform
    kind = device_kind().lower()
    return next((name for name in ("cpu", "tpu") if kind.startswith(name)), "gpu")


def on_hopper() -> bool:
    """Whether programs traced now are for a GPU of that generation."""
    return platform() == "gpu" and any(each in device_kind() for each in _HOPPER)


def in_16_bits(*dtypes: DTypeLike) -> bool:
    """Whether all are one type that the matrix units of GPUs multiply at full speed."""
    return len(set(dtypes)) == 1 and dtypes[0] in (jnp.bfloat16, jnp.float16)


def chosen(kernel: str, asked: str | None, known: Mapping[str, object]) -> str | None:
    """The backend that was asked for or set; None if the kernel is free to choose.

    Raises:
        UserError: There is no such backend.
    """
    choice: Choice = _choice.value
    name = asked or dict(choice.backends).get(kernel)
    if name is not None and name not in known:
        raise UserError(
            f"kernel {kernel}: there is no backend {name!r}; choose one of {', '.join(known)}."
        )
    return name
