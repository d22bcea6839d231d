"""Every backend of attention against the formula in float64, in value and gradient."""

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import assert_close, temporaries, value_and_gradients

from klong_jax.core.errors import UserError
from klong_jax.kernels.attention import attention, cached_attention, gpu, reference, tpu
from klong_jax.kernels.attention.mask import WindowMask
from klong_jax.kernels.backend import use_kernels


def inputs(
    rows: int, window: int, keys: int, heads: int, kv_heads: int, width: int
) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    query = rng.normal(size=(rows, window, heads, width))
    key, value = rng.normal(size=(2, rows, keys, kv_heads, width))
    return [query, key, value], rng.normal(size=query.shape)


def truth(arrays: list[np.ndarray], cotangent: np.ndarray, **options: Any) -> list[np.ndarray]:
    run = partial(attention, backend="reference", **options)
    return value_and_gradients(run, arrays, cotangent, dtype="float64")


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, Any]]:
    rows, kv_heads, groups = (draw(st.integers(1, 3)) for _ in range(3))
    window, prefix = draw(st.integers(1, 300)), draw(st.integers(0, 200))
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        lengths = st.lists(st.integers(0, window), min_size=rows, max_size=rows)
        options["lengths"] = np.asarray(draw(lengths))
    if draw(st.booleans()):
        lengths = st.lists(st.integers(0, prefix), min_size=rows, max_size=rows)
        options["prefix_lengths"] = np.asarray(draw(lengths))
    return (rows, window, prefix + window, kv_heads * groups, kv_heads, 8), options


def test_the_reference_is_the_formula() -> None:
    (query, key, value), _ = inputs(2, 3, 5, 2, 1, 4)
    mask = WindowMask(2, True, jnp.asarray([2, 1]), jnp.asarray([3, 2]))
    with jax.enable_x64(True):
        got = reference.attention(*map(jnp.asarray, (query, key, value)), mask, 0.5)
    seen = {(0, 0): [0, 1, 2], (0, 1): [0, 1, 2, 3], (0, 2): [0, 1, 2, 3, 4]}
    seen |= {(1, 0): [0, 2], (1, 1): [0, 2, 3], (1, 2): []}
    for (row, place), keys in seen.items():
        for head in range(2):
            scores = np.exp(0.5 * key[row, keys, 0] @ query[row, place, head])
            want = (scores / scores.sum()) @ value[row, keys, 0] if keys else np.zeros(4)
            np.testing.assert_allclose(got[row, place, head], want, atol=1e-14)


@given(cases())
@settings(max_examples=10)
def test_blocks_equal_the_reference(case: tuple[tuple[int, ...], dict[str, Any]]) -> None:
    shape, options = case
    arrays, cotangent = inputs(*shape)
    run = partial(attention, backend="cpu", **options)
    want = truth(arrays, cotangent, **options)
    assert_close(value_and_gradients(run, arrays, cotangent, dtype="float64"), want, 1e-12)


@pytest.mark.parametrize("window", [128, 640, 1100])
def test_stripes_of_several_blocks_equal_the_reference(window: int) -> None:
    arrays, cotangent = inputs(1, window, window + 70, 2, 1, 8)
    got = value_and_gradients(partial(attention, backend="cpu"), arrays, cotangent, dtype="float32")
    assert_close(got, truth(arrays, cotangent), 1e-5)


def in_segments(rows: list[list[int]], tokens: int) -> np.ndarray:
    """Rows of windows of so many tokens, one behind another."""
    numbers = [np.repeat(1 + np.arange(len(lengths)), lengths) for lengths in rows]
    return np.stack([np.pad(each, (0, tokens - len(each))) for each in numbers]).astype(np.int32)


PACKED = [[7, 1, 4], [10, 9], [], [24]]


@cache
def apart(causal: bool) -> list[np.ndarray]:
    """Values and gradients of each window of a row taken alone; zeros where there is none."""
    arrays, cotangent = inputs(4, 24, 24, 4, 2, 8)
    whole = [np.zeros_like(x) for x in (cotangent, *arrays)]
    for row, lengths in enumerate(PACKED):
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            here = np.s_[row : row + 1, end - length : end]
            alone = truth([x[here] for x in arrays], cotangent[here], causal=causal)
            for into, one in zip(whole, alone, strict=True):
                into[here] = one
    return whole


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu", "gpu"])
def test_windows_that_share_a_row_are_as_if_alone(backend: str, causal: bool) -> None:
    arrays, cotangent = inputs(4, 24, 24, 4, 2, 8)
    segments = in_segments(PACKED, 24)

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        if backend != "gpu":
            options: dict[str, Any] = {"segments": segments, "causal": causal}
            return attention(query, key, value, backend=backend, **options)
        # What runs over cuDNN on a GPU, over the formulas of its calls.
        mask = WindowMask(0, causal, segments=jnp.asarray(segments))
        flash = SimpleNamespace(forward_packed=packed_forward, backward_packed=packed_backward)
        return gpu.attention(query, key, value, mask, 8**-0.5, flash=flash)

    got = value_and_gradients(run, arrays, cotangent, dtype="float64")
    assert_close(got, apart(causal), 1e-12)
    for one in got:
        assert not one[segments == 0].any()


@partial(jax.jit, static_argnums=0)
def packed_step(backend: str, segments: jax.Array, cotangent: jax.Array, *arrays: Any) -> Any:
    run = partial(attention, segments=segments, backend=backend)
    out, pull = jax.vjp(run, *arrays)
    return out, *pull(cotangent)


@given(st.lists(st.lists(st.integers(1, 150), max_size=6), min_size=2, max_size=2))
@settings(max_examples=25)
def test_blocks_of_any_windows_in_a_row_equal_the_reference(rows: list[list[int]]) -> None:
    arrays, cotangent = inputs(2, 300, 300, 2, 1, 8)
    segments = np.concatenate([in_segments([row], sum(row) + 300)[:, :300] for row in rows])
    with jax.enable_x64(True):
        got, want = (
            packed_step(backend, segments, cotangent, *arrays) for backend in ("cpu", "reference")
        )
    assert_close(list(map(np.asarray, got)), list(map(np.asarray, want)), 1e-12)


RAGGED = {"lengths": np.asarray([130, 0, 77]), "prefix_lengths": np.asarray([0, 100, 170])}


@pytest.mark.parametrize(
    ("window", "keys", "options"),
    [
        (200, 200, {}),
        (130, 300, {}),
        (600, 1500, {"scale": 0.3}),
        (130, 300, RAGGED),
        (130, 300, RAGGED | {"causal": False}),
        (130, 300, {"causal": False}),
        (1500, 1500, {"segments": in_segments([[700, 3, 500], [300] * 5], 1500)}),
        (200, 200, {"segments": in_segments([[30, 40], []], 200), "causal": False}),
    ],
)
def test_splash_equals_the_reference(window: int, keys: int, options: dict[str, Any]) -> None:
    ragged = options.get("lengths", options.get("segments"))
    rows = 1 if ragged is None else len(ragged)
    arrays, cotangent = inputs(rows, window, keys, 4, 2, 16)
    got = value_and_gradients(partial(interpreted, **options), arrays, cotangent, dtype="float32")
    assert_close(got, truth(arrays, cotangent, **options), 1e-5)


def interpreted(
    query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float | None = None, **mask: Any
) -> jax.Array:
    arrays = {name: jnp.asarray(each) for name, each in mask.items() if name != "causal"}
    seen = WindowMask(key.shape[1] - query.shape[1], mask.get("causal", True), **arrays)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return tpu.attention(query, key, value, seen, scale, interpret=True)


def flash_scores(query: Any, key: Any, lengths: Any, causal: bool, scale: float) -> jax.Array:
    groups = query.shape[2] // key.shape[2]
    scores = jnp.einsum("bthd,bshd->bhts", query, jnp.repeat(key, groups, axis=2)) * scale
    seen = jnp.ones(scores.shape, bool)
    if causal:  # As in cuDNN, queries and keys begin together.
        seen &= jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if lengths is not None:
        seen &= (jnp.arange(key.shape[1]) < lengths[:, None])[:, None, None]
    return jnp.where(seen, scores, -jnp.inf)


def flash_forward(
    query: Any, key: Any, value: Any, lengths: Any, causal: bool, scale: float
) -> Any:
    scores = flash_scores(query, key, lengths, causal, scale)
    log_total = jax.nn.logsumexp(scores, axis=-1)
    values = jnp.repeat(value, query.shape[2] // key.shape[2], axis=2)
    return jnp.einsum("bhts,bshd->bthd", jnp.exp(scores - log_total[..., None]), values), log_total


def flash_backward(
    query: Any, key: Any, value: Any, lengths: Any, causal: bool, scale: float,
    log_total: Any, out: Any, d_out: Any,
) -> Any:  # fmt: skip
    groups = query.shape[2] // key.shape[2]
    keys, values = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = flash_scores(query, key, lengths, causal, scale)
    weights = jnp.exp(scores - log_total[..., None])
    drift = jnp.einsum("bthd,bthd->bht", out, d_out)[..., None]
    d_scores = weights * (jnp.einsum("bthd,bshd->bhts", d_out, values) - drift) * scale

    def grouped(x: Any) -> Any:
        return x.reshape(*x.shape[:2], -1, groups, x.shape[3]).sum(axis=3)

    d_key = grouped(jnp.einsum("bhts,bthd->bshd", d_scores, query))
    d_value = grouped(jnp.einsum("bhts,bthd->bshd", weights, d_out))
    return jnp.einsum("bhts,bshd->bthd", d_scores, keys), d_key, d_value


def sequences(x: Any, where: Any) -> jax.Array:
    """Sequences of packed rows, as cuDNN is told of them, each a row; and others' tokens behind."""
    places = where.starts[:, :, None] + jnp.arange(x.shape[1])
    taken = x[jnp.arange(x.shape[0])[:, None, None], jnp.minimum(places, x.shape[1] - 1)]
    return taken.reshape(-1, *x.shape[1:])


def in_rows(x: Any, where: Any, like: Any) -> jax.Array:
    """The inverse; no number where no sequence writes."""
    own = jnp.arange(like.shape[1])
    places = jnp.where(own < where.lengths[:, :, None], where.starts[:, :, None] + own, own.size)
    rows = jnp.broadcast_to(jnp.arange(like.shape[0])[:, None, None], places.shape)
    values = x.reshape(*places.shape, *like.shape[2:])
    return jnp.full_like(like, jnp.nan).at[rows, places].set(values, mode="drop")


def real_queries(x: Any, where: Any) -> jax.Array:
    return jnp.arange(x.shape[1]) < where.lengths.reshape(-1, 1)


def packed_forward(query: Any, key: Any, value: Any, where: Any, causal: bool, scale: float) -> Any:
    apart = (sequences(x, where) for x in (query, key, value))
    out, totals = flash_forward(*apart, where.lengths.reshape(-1), causal, scale)
    totals = jnp.where(real_queries(query, where)[:, None], totals, jnp.nan)
    return in_rows(out, where, query), totals.reshape(*where.lengths.shape, *totals.shape[1:])


def packed_backward(
    query: Any, key: Any, value: Any, where: Any, causal: bool, scale: float,
    totals: Any, out: Any, d_out: Any,
) -> Any:  # fmt: skip
    q, k, v, o, d_o = (sequences(x, where) for x in (query, key, value, out, d_out))
    d_o = jnp.where(real_queries(query, where)[:, :, None, None], d_o, 0)
    totals = totals.reshape(-1, *totals.shape[2:])
    gradients = flash_backward(q, k, v, where.lengths.reshape(-1), causal, scale, totals, o, d_o)
    return [in_rows(one, where, x) for one, x in zip(gradients, (query, key, value), strict=True)]


@pytest.mark.parametrize("prefix", [0, 20])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_two_flash_calls_merge_to_the_reference(prefix: int, ragged: bool, causal: bool) -> None:
    """The merge that runs over cuDNN on a GPU, over the formulas of its calls."""
    arrays, cotangent = inputs(3, 16, prefix + 16, 4, 2, 8)
    options: dict[str, Any] = {}
    if ragged:
        options = {"lengths": np.asarray([16, 0, 7])}
        options |= {"prefix_lengths": np.asarray([0, 20, 9])} if prefix else {}
    flash = SimpleNamespace(forward=flash_forward, backward=flash_backward)

    def merged(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        mask = WindowMask(prefix, causal, **options)
        return gpu.attention(query, key, value, mask, 8**-0.5, flash=flash)

    got = value_and_gradients(merged, arrays, cotangent, dtype="float64")
    assert_close(got, truth(arrays, cotangent, causal=causal, **options), 1e-12)


def test_padding_and_empty_windows_give_zeros_and_no_gradient() -> None:
    arrays, cotangent = inputs(2, 6, 10, 2, 1, 4)
    run = partial(attention, lengths=np.asarray([0, 4]), prefix_lengths=np.asarray([3, 0]))
    out, d_query, d_key, d_value = value_and_gradients(run, arrays, cotangent, dtype="float32")
    assert not out[0].any() and not d_query[0].any()
    assert not d_key[0].any() and not d_value[0].any()
    assert not out[1, 4:].any() and not d_query[1, 4:].any()
    assert not d_key[1, :4].any() and not d_key[1, 8:].any()
    assert out[1, :4].all() and d_value[1, 4:8].all()


def test_memory_is_linear_in_the_length() -> None:
    def step(query: Any, key: Any, value: Any) -> Any:
        return jax.grad(lambda *x: attention(*x).sum(), argnums=(0, 1, 2))(query, key, value)

    def at(length: int) -> int:
        query = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        key = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        with use_kernels(attention="cpu"):
            return temporaries(step, query, key, key)

    half, whole = at(8192), at(16384)
    assert whole < 2.1 * half
    assert whole < 16384 * 16384  # A table of scores has four times as many bytes.


@pytest.mark.parametrize("new", [1, 5, 200])
def test_a_cache_is_seen_up_to_each_row_s_own_position(new: int) -> None:
    (query, key, value), _ = inputs(2, new, 300, 4, 2, 8)
    starts = np.asarray([0, 99])
    positions = starts[:, None] + np.arange(new)
    got = jax.jit(cached_attention)(*map(jnp.float32, (query, key, value)), positions)
    for row, start in enumerate(starts):
        one = [query[row : row + 1], *(x[row : row + 1, : start + new] for x in (key, value))]
        want = attention(*map(jnp.float32, one), backend="reference")
        np.testing.assert_allclose(got[row], want[0], atol=1e-5)


def test_what_does_not_fit_is_said_in_a_sentence() -> None:
    arrays = [jnp.zeros(x.shape) for x in inputs(1, 4, 3, 2, 1, 4)[0]]
    with pytest.raises(UserError, match=r"at least as many keys as queries"):
        attention(*arrays)
    with pytest.raises(UserError, match=r"no prefix before them and no lengths"):
        attention(arrays[0][:, :3], *arrays[1:], lengths=jnp.ones(1), segments=jnp.ones((1, 3)))
    arrays = [jnp.zeros(x.shape) for x in inputs(1, 3, 3, 2, 1, 4)[0]]
    with (
        use_kernels(platform="gpu"),
        pytest.raises(UserError, match=r"on Hopper GPUs only, .* not \(1, 3, 2, 4\) on cpu;"),
    ):
        attention(*arrays, segments=jnp.ones((1, 3)), backend="gpu")
    with pytest.raises(UserError, match=r"no backend 'cuda'; choose one of reference, cpu"):
        attention(*arrays, backend="cuda")


def test_a_backend_is_set_for_all_that_is_traced_inside() -> None:
    arrays = [jnp.zeros(x.shape) for x in inputs(1, 3, 3, 2, 1, 4)[0]]
    trace = jax.jit(attention)
    usual = trace.lower(*arrays).as_text()
    with use_kernels(attention="reference"):
        assert trace.lower(*arrays).as_text() != usual
    assert trace.lower(*arrays).as_text() == usual
