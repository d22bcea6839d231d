"""Grouped matrix multiplication: the signature and the dispatch."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from klong_jax.core.errors import UserError
from klong_jax.kernels.backend import chosen, device_kind, in_16_bits, on_hopper, platform
from klong_jax.kernels.grouped_matmul import cpu, reference, tpu

Backend = Callable[[Array, Array, Array], Array]


def _hopper(
    lhs: Float[Array, "m k"], rhs: Float[Array, "e k n"], group_sizes: Int[Array, "e"]
) -> Float[Array, "m n"]:
    # Here and not above, as below: what the kernels are compiled with is not in every jaxlib.
    from klong_jax.kernels.grouped_matmul import hopper

    return hopper.grouped_matmul(lhs, rhs, group_sizes)


def _triton(
    lhs: Float[Array, "m k"], rhs: Float[Array, "e k n"], group_sizes: Int[Array, "e"]
) -> Float[Array, "m n"]:
    from klong_jax.kernels.grouped_matmul import triton

    return triton.grouped_matmul(lhs, rhs, group_sizes)


BACKENDS: Mapping[str, Backend] = {
    "reference": reference.grouped_matmul,
    "cpu": cpu.grouped_matmul,
    "xla": jax.lax.ragged_dot,
    "triton": _triton,
    "hopper": _hopper,
    "tpu": tpu.grouped_matmul,
}
"""Each takes rows, matrices and group sizes; what it makes of rows past the groups is dropped."""

# What the kernels copy is in whole steps of the contracted widths, and in tiles of rows.
_HOPPER_WIDTHS, _HOPPER_ROWS = 64, 8
# Where the compiler multiplies each row with one matrix only; elsewhere it takes all of them.
_SPARSE_RAGGED_DOT = ("TPU v5", "TPU v5p")


def grouped_matmul(
    lhs: Float[Array, "m k"],
    rhs: Float[Array, "e k n"],
    group_sizes: Int[Array, "e"],
    *,
    backend: str | None = None,
) -> Float[Array, "m n"]:
    """Multiplies the first group_sizes[0] rows with rhs[0], the next with rhs[1], and so on.

    Rows past the sum of the sizes give zeros, and get no gradient.

    Args:
        lhs: Rows, sorted by group.
        rhs: A matrix a group.
        group_sizes: Rows a group, int32; may be 0.
        backend: One of BACKENDS; chosen by platform and shape if None.

    Raises:
        UserError: There is no such backend, or it does not take these shapes.
    """
    name = chosen("grouped_matmul", backend, BACKENDS) or _by_shape(lhs, rhs)
    if name == "hopper" and not _fits_hopper(lhs, rhs):
        raise UserError(
            f"grouped_matmul: the backend hopper takes 16 bits, widths that {_HOPPER_WIDTHS} and "
            f"rows that {_HOPPER_ROWS} divides, not {lhs.dtype}{list(lhs.shape)} and "
            f"{rhs.dtype}{list(rhs.shape)}."
        )
    total = jnp.sum(group_sizes)
    # On both sides: the kernels leave other rows' values, and gradients, as memory held them.
    return _zero_past(total, BACKENDS[name](_no_gradient_past(total, lhs), rhs, group_sizes))


def _by_shape(lhs: Float[Array, "m k"], rhs: Float[Array, "e k n"]) -> str:
    name = platform()
    if name == "gpu":
        if on_hopper() and _fits_hopper(lhs, rhs):
            return "hopper"
        return "triton" if in_16_bits(lhs.dtype, rhs.dtype) else "cpu"
    return "xla" if device_kind() in _SPARSE_RAGGED_DOT else name


def _fits_hopper(lhs: Float[Array, "m k"], rhs: Float[Array, "e k n"]) -> bool:
    whole = all(width % _HOPPER_WIDTHS == 0 for width in rhs.shape[1:])
    return whole and lhs.shape[0] % _HOPPER_ROWS == 0 and in_16_bits(lhs.dtype, rhs.dtype)


def _zero_past(total: Int[Array, ""], rows: Float[Array, "m n"]) -> Float[Array, "m n"]:
    return jnp.where((jnp.arange(rows.shape[0]) < total)[:, None], rows, 0)


@jax.custom_vjp
def _no_gradient_past(total: Int[Array, ""], rows: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """The rows as they are: to make zeros of those past the groups would take a copy."""
    return rows


_no_gradient_past.defvjp(
    lambda total, rows: (rows, total),
    lambda total, d_rows: (None, _zero_past(total, d_rows)),
)
