"""The gradient of a grouped matrix multiplication: two more of them, whatever computes them."""

from collections.abc import Callable
from typing import Protocol

import jax
from jaxtyping import Array, Float, Int


class Product(Protocol):
    """Multiplies each group's rows with its matrix or, `transposed`, with its transpose."""

    def __call__(
        self,
        lhs: Float[Array, "m a"],
        rhs: Float[Array, "e k n"],
        group_sizes: Int[Array, "e"],
        /,
        *,
        transposed: bool,
    ) -> Float[Array, "m b"]:
        """Rows past the groups hold anything."""


Outer = Callable[[Array, Array, Array], Array]
"""From lhs[m,k], d_out[m,n] and group sizes to each group's lhs.T @ d_out, [e,k,n]."""

Residuals = tuple[Float[Array, "m k"], Float[Array, "e k n"], Int[Array, "e"]]


def differentiable(product: Product, outer: Outer) -> Callable[[Array, Array, Array], Array]:
    """The multiplication, with these kernels forward and backward."""

    @jax.custom_vjp
    def grouped_matmul(
        lhs: Float[Array, "m k"], rhs: Float[Array, "e k n"], group_sizes: Int[Array, "e"]
    ) -> Float[Array, "m n"]:
        return product(lhs, rhs, group_sizes, transposed=False)

    def forward(
        lhs: Float[Array, "m k"], rhs: Float[Array, "e k n"], group_sizes: Int[Array, "e"]
    ) -> tuple[Float[Array, "m n"], Residuals]:
        return product(lhs, rhs, group_sizes, transposed=False), (lhs, rhs, group_sizes)

    def backward(
        residuals: Residuals, d_out: Float[Array, "m n"]
    ) -> tuple[Float[Array, "m k"], Float[Array, "e k n"], None]:
        lhs, rhs, group_sizes = residuals
        d_lhs = product(d_out, rhs, group_sizes, transposed=True)
        return d_lhs, outer(lhs, d_out, group_sizes).astype(rhs.dtype), None

    grouped_matmul.defvjp(forward, backward)
    made: Callable[[Array, Array, Array], Array] = grouped_matmul
    return made
