"""What `klong bench` times: each kernel, what others offer for the same, and the bare matmuls."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from klong_jax.kernels.attention import attention
from klong_jax.kernels.backend import platform
from klong_jax.kernels.grouped_matmul import grouped_matmul
from klong_jax.kernels.linear_cross_entropy import linear_cross_entropy, reference


@dataclass(frozen=True)
class Work:
    """A function of arrays.

    Attributes:
        function: Compiled before it is timed.
        arguments: Its arguments.
        flops: Useful operations in one call: nothing that is computed a second time.
    """

    function: Callable[..., Any]
    arguments: tuple[Array, ...]
    flops: float


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: Its shape, and whether it is the forward pass or both passes.
        ours: The kernel.
        limit: Matrix multiplications and nothing else, as fast as this device does them.
        peers: Others' ways to the same result.
    """

    name: str
    ours: Work
    limit: Work
    peers: Mapping[str, Work] = field(default_factory=dict)


def attention_cases() -> Iterator[Case]:
    """A window on itself, half as long a one on a prefix and itself, and windows in one row."""
    large = platform() != "cpu"
    heads, kv_heads, width = (16, 8, 128) if large else (4, 2, 32)
    side = 8192 if large else 1024
    square = _normal((side, side), 9)
    limit = Work(jnp.dot, (square, square), 2 * side**3)
    for keys in (16384, 65536) if large else (512, 1024):
        for window in (keys, keys // 2):
            query = _normal((1, window, heads, width), 0)
            key, value = (_normal((1, keys, kv_heads, width), seed) for seed in (1, 2))
            pairs = window * (keys - window) + window * (window + 1) / 2
            others = _attention_peers(window, keys)
            for backward in (False, True):
                # A flash backward pass has five products for the forward pass's two.
                flops = 4 * heads * width * pairs * (3.5 if backward else 1)
                shape = f"{window} on {keys}"
                yield _case(shape, attention, (query, key, value), flops, backward, limit, others)
        query = _normal((1, keys, heads, width), 0)
        key, value = (_normal((1, keys, kv_heads, width), seed) for seed in (1, 2))
        yield from _packed_cases(query, key, value, limit)


def _packed_cases(query: Array, key: Array, value: Array, limit: Work) -> Iterator[Case]:
    """A window that fills its row, and sixteen that share it."""
    _, tokens, heads, width = query.shape
    for windows in (1, 16):
        length = tokens // windows
        packed = partial(attention, segments=1 + jnp.arange(tokens)[None] // length)
        peers = {"a row each": partial(_a_row_each, windows)}
        for backward in (False, True):
            flops = 2 * heads * width * tokens * (length + 1) * (3.5 if backward else 1)
            shape = f"{windows} packed in {tokens}"
            yield _case(shape, packed, (query, key, value), flops, backward, limit, peers)


def _a_row_each(windows: int, *arrays: Array) -> Array:
    query, key, value = (x.reshape(windows, -1, *x.shape[2:]) for x in arrays)
    return attention(query, key, value).reshape(arrays[0].shape)


def _attention_peers(window: int, keys: int) -> dict[str, Callable[..., Array]]:
    if platform() == "cpu":
        seen = jnp.arange(keys) <= jnp.arange(keys - window, keys)[:, None]
        return {"jax.nn": partial(jax.nn.dot_product_attention, mask=seen[None, None])}
    if platform() == "tpu":
        return {}
    cudnn = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    if window == keys:
        return {"jax.nn cudnn": cudnn}

    def padded(query: Array, key: Array, value: Array) -> Array:
        # jax.nn's causal mask lets queries and keys begin together.
        queries = jnp.pad(query, ((0, 0), (keys - window, 0), (0, 0), (0, 0)))
        return cudnn(queries, key, value)[:, keys - window :]

    return {"jax.nn cudnn, padded": padded}


def grouped_matmul_cases() -> Iterator[Case]:
    """Experts of a fine-grained mixture, with even groups and with uneven ones."""
    large = platform() != "cpu"
    rows, inner, outer, groups = (65536, 2048, 768, 128) if large else (2048, 128, 96, 32)
    lhs, rhs = _normal((rows, inner), 0), _normal((groups, inner, outer), 1)
    even = jnp.full(groups, rows // groups, jnp.int32)
    shares = jax.random.gamma(jax.random.key(2), 1.0, (groups,))
    uneven = jnp.floor(shares / shares.sum() * rows).astype(jnp.int32)
    for name, sizes in (("even", even), ("uneven", uneven)):
        peers: dict[str, Callable[..., Array]] = {
            "lax.ragged_dot": partial(_in_groups, jax.lax.ragged_dot, sizes)
        }
        if platform() == "gpu":
            triton = partial(grouped_matmul, backend="triton")
            peers["triton"] = partial(_in_groups, triton, sizes)
        if name == "even":
            peers["batched dense"] = _as_batch
        for backward in (False, True):
            flops = 2.0 * int(sizes.sum()) * inner * outer * (3 if backward else 1)
            dense = 2.0 * rows * inner * outer * (3 if backward else 1)
            limit = Work(_step(jnp.dot, backward), (lhs, rhs[0]), dense)
            yield _case(
                f"{groups} {name} groups, {rows} x {inner} x {outer}",
                partial(_in_groups, grouped_matmul, sizes),
                (lhs, rhs),
                flops,
                backward,
                limit,
                peers,
            )


def _in_groups(product: Callable[..., Array], sizes: Array, lhs: Array, rhs: Array) -> Array:
    return product(lhs, rhs, sizes)


def _as_batch(lhs: Array, rhs: Array) -> Array:
    out = jnp.matmul(lhs.reshape(rhs.shape[0], -1, rhs.shape[1]), rhs)
    return out.reshape(lhs.shape[0], -1)


def linear_cross_entropy_cases() -> Iterator[Case]:
    """Forward and backward; the limit is the three products of hidden states and embedding."""
    large = platform() != "cpu"
    tokens, width, vocab = (16384, 1024, 151936) if large else (1024, 128, 4096)
    hidden, embedding = _normal((tokens, width), 0), _normal((vocab, width), 1)
    targets = jax.random.randint(jax.random.key(2), (tokens,), 0, vocab)
    weights = jnp.ones(tokens)

    def ours(hidden: Array, embedding: Array) -> Array:
        return linear_cross_entropy(hidden, embedding, targets, weights).weighted_sum

    def plain(hidden: Array, embedding: Array) -> Array:
        return -jnp.sum(weights * reference.token_logprobs(hidden, embedding, targets)[0])

    def products(hidden: Array, embedding: Array) -> tuple[Array, Array, Array]:
        block = 2048  # A table of all logits would not fit; one block of it is used for all.

        def one(total: Array, states: Array) -> tuple[Array, tuple[Array, Array]]:
            logits = jnp.dot(states, embedding.T)
            return total + jnp.dot(logits.T, states), (jnp.dot(logits, embedding), logits[0])

        pieces = hidden.reshape(-1, min(block, tokens), width)
        total, (states, kept) = jax.lax.scan(one, jnp.zeros_like(embedding), pieces)
        return total, states, kept

    flops = 6.0 * tokens * width * vocab
    arguments = hidden, embedding
    yield Case(
        f"{tokens} x {width} x {vocab}, both",
        Work(jax.value_and_grad(ours, argnums=(0, 1)), arguments, flops),
        Work(products, arguments, flops),
        {"all logits": Work(jax.value_and_grad(plain, argnums=(0, 1)), arguments, flops)},
    )


CASES: Mapping[str, Callable[[], Iterator[Case]]] = {
    "attention": attention_cases,
    "grouped_matmul": grouped_matmul_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
}
"""Of each kernel; small ones on a CPU, and in 16 bits elsewhere."""


def _case(
    shape: str,
    kernel: Callable[..., Array],
    arguments: tuple[Array, ...],
    flops: float,
    backward: bool,
    limit: Work,
    peers: Mapping[str, Callable[..., Array]],
) -> Case:
    def work(function: Callable[..., Array]) -> Work:
        return Work(_step(function, backward), arguments, flops)

    name = f"{shape}, {'both' if backward else 'forward'}"
    return Case(name, work(kernel), limit, {peer: work(f) for peer, f in peers.items()})


def _step(function: Callable[..., Array], backward: bool) -> Callable[..., Any]:
    if not backward:
        return function

    def step(*arguments: Array) -> Any:
        out, pull = jax.vjp(function, *arguments)
        return out, pull(out)

    return step


def _normal(shape: tuple[int, ...], seed: int) -> Array:
    kind = jnp.float32 if platform() == "cpu" else jnp.bfloat16
    return jax.random.normal(jax.random.key(seed), shape, kind)
