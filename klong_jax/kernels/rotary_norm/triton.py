"""One pass over the heads in each direction, in Pallas through Triton.

With r = 1 / rms(x), n = r x and y = R(n * scale), where R rotates: given dy, g = R'(dy) is what
n * scale is asked for, and dscale = sum(g n), dx = r (g scale - n mean(g scale n)).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

Heads = Float[Array, "n h d"]
Angles = Float[Array, "n half"]

_ROWS = 16
_PARAMETERS = plt.CompilerParams(num_warps=4, num_stages=1)
_load = partial(plt.load, other=0)


def rotary_norm(
    heads: Float[Array, "b t h d"],
    scale: Float[Array, "d"],
    cos: Float[Array, "b t half"],
    sin: Float[Array, "b t half"],
    epsilon: float,
) -> Float[Array, "b t h d"]:
    """Normalises, scales and rotates heads whose width is a power of two."""
    rows = heads.reshape(-1, *heads.shape[2:])
    angles = (each.astype(jnp.float32).reshape(len(rows), -1) for each in (cos, sin))
    return _turned(rows, scale.astype(jnp.float32), *angles, epsilon).reshape(heads.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _turned(
    heads: Heads, scale: Float[Array, "d"], cos: Angles, sin: Angles, epsilon: float
) -> Heads:
    def body(heads: Any, scale: Any, cos: Any, sin: Any, out: Any) -> None:
        tile = _Tile(heads.shape, cos, sin)
        scales = tile.halves(scale)

        def head(index: Any, _: Any) -> Any:
            normed, _ = tile.normed(heads, index, epsilon)
            first, second = (each * by for each, by in zip(normed, scales, strict=True))
            turned = first * tile.cos - second * tile.sin, second * tile.cos + first * tile.sin
            tile.store(out, index, turned)
            return 0

        jax.lax.fori_loop(0, heads.shape[1], head, 0)

    shape = jax.ShapeDtypeStruct(heads.shape, heads.dtype)
    out: Heads = _run(body, shape, len(heads))(heads, scale, cos, sin)
    return out


Residuals = tuple[Heads, Float[Array, "d"], Angles, Angles]


def _forward(
    heads: Heads, scale: Float[Array, "d"], cos: Angles, sin: Angles, epsilon: float
) -> tuple[Heads, Residuals]:
    return _turned(heads, scale, cos, sin, epsilon), (heads, scale, cos, sin)


def _backward(epsilon: float, residuals: Residuals, d_out: Heads) -> tuple[Array, ...]:
    heads, scale, cos, sin = residuals
    width = heads.shape[-1]

    def body(
        heads: Any, scale: Any, cos: Any, sin: Any, d_out: Any, d_heads: Any, d_scale: Any
    ) -> None:
        tile = _Tile(heads.shape, cos, sin)
        scales = tile.halves(scale)

        def head(index: Any, sums: Any) -> Any:
            (one, two), inverse = tile.normed(heads, index, epsilon)
            first, second = tile.load(d_out, index)
            asked = first * tile.cos + second * tile.sin, second * tile.cos - first * tile.sin
            left, right = (each * by for each, by in zip(asked, scales, strict=True))
            mean = jnp.sum(left * one + right * two, axis=1, keepdims=True) / width
            tile.store(
                d_heads, index, (inverse * (left - one * mean), inverse * (right - two * mean))
            )
            parts = jnp.sum(asked[0] * one, axis=0), jnp.sum(asked[1] * two, axis=0)
            return sums[0] + parts[0], sums[1] + parts[1]

        zeros = jnp.zeros(width // 2, jnp.float32)
        sums = jax.lax.fori_loop(0, heads.shape[1], head, (zeros, zeros))
        for at, part in zip((0, width // 2), sums, strict=True):
            plt.store(d_scale.at[pl.program_id(0), pl.ds(at, width // 2)], part)

    tiles = pl.cdiv(len(heads), _ROWS)
    shapes = (
        jax.ShapeDtypeStruct(heads.shape, heads.dtype),
        jax.ShapeDtypeStruct((tiles, width), jnp.float32),
    )
    d_heads, d_scale = _run(body, shapes, len(heads))(heads, scale, cos, sin, d_out)
    return d_heads, jnp.sum(d_scale, axis=0), jnp.zeros_like(cos), jnp.zeros_like(sin)


_turned.defvjp(_forward, _backward)


class _Tile:
    """Some rows of heads; halves of a head are apart, since they are rotated against each other."""

    def __init__(self, shape: tuple[int, ...], cos: Any, sin: Any) -> None:
        rows, _, self._width = shape
        start = pl.program_id(0) * _ROWS
        self._rows = pl.ds(start, _ROWS)
        self._real = (start + jnp.arange(_ROWS) < rows)[:, None]
        every = pl.ds(0, self._width // 2)
        self.cos, self.sin = (_load(x.at[self._rows, every], mask=self._real) for x in (cos, sin))

    def halves(self, scale: Any) -> tuple[Any, Any]:
        """Of a vector as wide as a head."""
        first, second = (plt.load(scale.at[half]) for half in self._spans())
        return first, second

    def load(self, heads: Any, index: Any) -> tuple[Any, Any]:
        """Halves of one head of each row, in float32; zeros past the end."""
        first, second = (
            _load(heads.at[self._rows, index, half], mask=self._real).astype(jnp.float32)
            for half in self._spans()
        )
        return first, second

    def normed(self, heads: Any, index: Any, epsilon: float) -> tuple[tuple[Any, Any], Any]:
        """Halves of one head of each row by their root mean square, and its inverse."""
        first, second = self.load(heads, index)
        squares = jnp.sum(first * first + second * second, axis=1, keepdims=True)
        inverse = jax.lax.rsqrt(squares / self._width + epsilon)
        return (first * inverse, second * inverse), inverse

    def store(self, heads: Any, index: Any, halves: tuple[Any, Any]) -> None:
        """Writes both halves of one head of each row."""
        for half, value in zip(self._spans(), halves, strict=True):
            at = heads.at[self._rows, index, half]
            plt.store(at, value.astype(heads.dtype), mask=self._real)

    def _spans(self) -> tuple[Any, Any]:
        half = self._width // 2
        return pl.ds(0, half), pl.ds(half, half)


def _run(body: Any, shapes: Any, rows: int) -> Any:
    grid = (pl.cdiv(rows, _ROWS),)
    return pl.pallas_call(body, out_shape=shapes, grid=grid, compiler_params=_PARAMETERS)
