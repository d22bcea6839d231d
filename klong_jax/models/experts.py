"""Routed experts without dropped tokens, on one device or over a mesh.

Tokens are sorted by expert and each expert's matrices meet its rows in one grouped product. Over a
mesh every device routes only tokens of its own: those of the devices along the expert axis are
gathered, each device adds what its experts make of them, and the sums are scattered back. Shapes
follow from the number of tokens alone, whatever the router says.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from klong_jax.kernels.grouped_matmul import grouped_matmul
from klong_jax.models.config import MoeConfig
from klong_jax.models.routing import expert_load, route
from klong_jax.parallel.rules import active_rules, named_spec

_INNER = ("experts", "stored_expert_embed", "mlp")
_DOWN = ("experts", "mlp", "stored_expert_embed")


Counted = Bool[Array, "b t"] | None


class ExpertWeights(NamedTuple):
    """The matrices of the experts, in the compute dtype."""

    gate: Float[Array, "e w f"]
    up: Float[Array, "e w f"]
    down: Float[Array, "e f w"]


class Routed(NamedTuple):
    """Tokens, and the experts they go to with their weights."""

    tokens: Float[Array, "n w"]
    weights: Float[Array, "n k"]
    chosen: Int[Array, "n k"]


def mixture(
    x: Float[Array, "b t w"],
    router: Float[Array, "w e"],
    bias: Float[Array, " e"] | None,
    experts: ExpertWeights,
    config: MoeConfig,
    counted: Counted = None,
) -> tuple[Float[Array, "b t w"], Int[Array, " e"]]:
    """The weighted sum of what each token's experts make of it, and each expert's counted tokens.

    Args:
        x: Tokens.
        router: Scores experts.
        bias: The experts' bias in the choice.
        experts: Their matrices.
        config: The mixture.
        counted: Which tokens the experts' load counts; all if None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        return _mixture_on_mesh(x, router, bias, experts, config, counted)
    routed = _route(x, router, bias, config)
    y = _apply_experts(routed, experts, 0)
    return y.reshape(x.shape), _load(routed, counted, config)


def _load(routed: Routed, counted: Counted, config: MoeConfig) -> Int[Array, " e"]:
    mask = None if counted is None else counted.reshape(-1)
    return expert_load(routed.chosen, mask, config.num_experts)


def _route(
    x: Float[Array, "b t w"],
    router: Float[Array, "w e"],
    bias: Float[Array, " e"] | None,
    config: MoeConfig,
) -> Routed:
    tokens = x.reshape(-1, x.shape[-1])
    precision = jnp.promote_types(x.dtype, jnp.float32)
    logits = tokens.astype(precision) @ router.astype(precision)
    weights, chosen = route(logits, None if bias is None else bias.astype(precision), config)
    return Routed(tokens, weights, chosen)


def _apply_experts(
    routed: Routed, experts: ExpertWeights, first: int | Array
) -> Float[Array, "n w"]:
    """What experts `first` and after make of the tokens; other experts' part is zero."""
    count, top_k = routed.chosen.shape
    here = experts.gate.shape[0]
    local = routed.chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < here), local, here)
    order = jnp.argsort(local, stable=True)
    back = jnp.argsort(order)
    sizes = jnp.diff(jnp.searchsorted(local[order], jnp.arange(here + 1))).astype(jnp.int32)

    rows = _spread(top_k, routed.tokens, order, back)
    gate = grouped_matmul(rows, experts.gate, sizes)
    up = grouped_matmul(rows, experts.up, sizes)
    made = grouped_matmul(jax.nn.silu(gate) * up, experts.down, sizes)
    made = _permute(made, back, order).reshape(count, top_k, -1)
    return jnp.einsum("nkw,nk->nw", made, routed.weights).astype(made.dtype)


def _mixture_on_mesh(
    x: Float[Array, "b t w"],
    router: Float[Array, "w e"],
    bias: Float[Array, " e"] | None,
    experts: ExpertWeights,
    config: MoeConfig,
    counted: Counted,
) -> tuple[Float[Array, "b t w"], Int[Array, " e"]]:
    mesh, rules = jax.sharding.get_abstract_mesh(), active_rules()
    spec = partial(named_spec, mesh=mesh, rules=rules)
    x_spec = spec(x.shape, ("batch", "length", "embed"))
    inner, down = spec(experts.gate.shape, _INNER), spec(experts.down.shape, _DOWN)
    over_experts, over_width, over_columns = map(_axes, inner)
    over_tokens = (*_axes(x_spec[0]), *_axes(x_spec[1]))

    def body(
        x: Array, router: Array, bias: Array | None, stored: ExpertWeights, counted: Counted
    ) -> tuple[Array, Array]:
        whole = ExpertWeights(
            _gather(stored.gate, over_width, 1),
            _gather(stored.up, over_width, 1),
            _gather(stored.down, over_width, 2),
        )
        routed = _route(x, router, bias, config)
        load = _load(routed, counted, config)
        first = _index(over_experts) * whole.gate.shape[0]
        if over_experts and set(over_experts) <= set(over_tokens):
            y = _exchange(routed, whole, first, over_experts)
        else:
            y = _apply_experts(routed, whole, first)
            y = jax.lax.psum(y, over_experts) if over_experts else y
        y = jax.lax.psum(y, over_columns) if over_columns else y
        load = jax.lax.psum(load, over_tokens) if over_tokens else load
        return y.reshape(x.shape), load

    none = PartitionSpec()
    mapped = jax.shard_map(
        body,
        in_specs=(
            x_spec,
            none,
            none,
            ExpertWeights._make((inner, inner, down)),
            PartitionSpec(*x_spec[:2]),
        ),
        out_specs=(x_spec, none),
        check_vma=False,
    )
    result: tuple[Array, Array] = mapped(x, router, bias, experts, counted)
    return result


def _exchange(
    routed: Routed, experts: ExpertWeights, first: int | Array, axes: tuple[str, ...]
) -> Float[Array, "n w"]:
    """What all experts make of this device's tokens, each device using only its own experts.

    The devices' tokens are taken one device at a time, so that their sorted copies, as long as if
    all of them went to experts of this device, exist for one at a time.
    """
    blocks = jax.lax.all_gather(routed, axes)
    made = jax.lax.map(jax.checkpoint(lambda block: _apply_experts(block, experts, first)), blocks)
    return jax.lax.psum_scatter(made, axes)


def _gather(matrix: Array, axes: tuple[str, ...], dimension: int) -> Array:
    return jax.lax.all_gather(matrix, axes, axis=dimension, tiled=True) if axes else matrix


def _index(axes: tuple[str, ...]) -> Array | int:
    return jax.lax.axis_index(axes) if axes else 0


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


@jax.custom_vjp
def _permute(rows: Array, order: Array, back: Array) -> Array:
    """`rows[order]`; `back` undoes it, so that the gradient too is gathered and not scattered."""
    return rows[order]


_permute.defvjp(
    lambda rows, order, back: (rows[order], back),
    lambda back, grad: (grad[back], None, None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(top_k: int, tokens: Array, order: Array, back: Array) -> Array:
    """Each token `top_k` times, in the order of its experts; its gradient is gathered too."""
    return tokens[order // top_k]


_spread.defvjp(
    lambda top_k, tokens, order, back: (tokens[order // top_k], back),
    lambda top_k, back, grad: (_sum_copies(top_k, grad[back]), None, None),
)


def _sum_copies(top_k: int, rows: Array) -> Array:
    return rows.reshape(-1, top_k, rows.shape[-1]).sum(axis=1)
