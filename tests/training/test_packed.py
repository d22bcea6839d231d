"""Windows that share rows train as if each had a row of its own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import LIMIT, MIXTURE, MODELS, OPTIMIZER, VOCAB, gradients, listening, off, trainer
from hypothesis import given, settings
from hypothesis import strategies as st

from klong_jax.core.trajectory import Window
from klong_jax.models.decoder import build
from klong_jax.models.routing import EXPERT_LOADS
from klong_jax.rl.reference import make_refer
from klong_jax.training.accumulate import init_state
from klong_jax.training.batches import Group, Layout, WindowBatch, lay_out

APART, PACKED = Layout(LIMIT, 2), Layout(LIMIT, 2, pack=True)


def chat(length: int, seed: int, trained: float = 0.5) -> Group:
    """A window of its own, of random tokens a share of which is trained."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, length, np.int32)
    logprobs = (-3 - rng.random(length)).astype(np.float32)
    return (Window(0, 0, tokens, rng.random(length) < trained, logprobs, tokens, length),)


CHATS = [chat(length, length) for length in (30, 5, LIMIT, 1, 12, 17, 2, 40, 8)]
CHATS += [chat(20, 0, trained=0.0), chat(30, 1, trained=0.05)]
CASES: list[dict[str, str]] = [
    {"model": "tied", "remat": "none", "objective": "sft"},
    {"model": "tied", "remat": "dots", "objective": "rl"},
    {"model": "mixture", "remat": "attention", "objective": "sft"},
]


def test_the_gradient_is_that_of_windows_apart(measured: Callable[[str], None]) -> None:
    assert not CHATS[-1][0].trained_mask[-1], "one has untrained tokens at its end"
    rows = []
    for case in CASES:
        apart, logs = gradients(CHATS, APART, **case)
        found, packed_logs = gradients(CHATS, PACKED, **case)
        assert packed_logs.keys() == logs.keys()
        loads, packed_loads = logs.pop(EXPERT_LOADS, None), packed_logs.pop(EXPERT_LOADS, None)
        if loads is not None:
            ends = [np.flatnonzero(w.trained_mask).max(initial=-1) + 1 for (w,) in CHATS]
            assert loads.sum(axis=1).tolist() == [MIXTURE.top_k * sum(ends)] * 2
            assert (packed_loads == loads).all()
        rows.append((case, off(found, apart), off(list(packed_logs.values()), list(logs.values()))))
    measured(f"{'model':8} {'remat':10} {'loss':5} {'gradients':>10} {'sums':>8}")
    for case, grads, sums in rows:
        named = "{model:8} {remat:10} {objective:5}".format(**case)
        measured(f"{named} {grads:10.1e} {sums:8.1e}")
    for case, grads, sums in rows:
        assert grads < 1e-12, case
        assert sums < 1e-12, case


@settings(max_examples=25)
@given(st.lists(st.integers(1, LIMIT), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_windows_of_any_lengths_give_the_gradient_of_windows_apart(
    lengths: list[int], seed: int
) -> None:
    groups = [chat(length, seed + number) for number, length in enumerate(lengths)]
    apart, logs = gradients(groups, APART)
    found, packed_logs = gradients(groups, PACKED)
    assert off(found, apart) < 1e-12
    assert float(packed_logs["loss"]) == pytest.approx(float(logs["loss"]), rel=1e-12)


def test_the_reference_policy_sees_each_window_alone() -> None:
    graph, params = build(MODELS["tied"], 1)
    refer = make_refer(graph, params, 0.7)
    seen = 0
    for batch in map(refer, lay_out(CHATS, [1.0] * len(CHATS), PACKED)):
        batch = jax.tree.map(np.asarray, batch)
        assert isinstance(batch, WindowBatch)
        for row, number in np.ndindex(len(batch.segments), int(batch.segments.max())):
            here = np.asarray(batch.segments[row] == number + 1)
            tokens, known = (
                np.asarray(x[row, here]) for x in (batch.tokens, batch.reference_logprobs)
            )
            if not len(tokens):
                continue
            none = tokens.astype(np.float32)
            window = Window(0, 0, tokens, tokens >= 0, none, tokens, len(tokens))
            (alone,) = map(refer, lay_out([(window,)], [1.0], APART))
            assert isinstance(alone, WindowBatch)
            # Nothing predicts a first token.
            want = np.asarray(alone.reference_logprobs)[0, 1 : len(tokens)]
            np.testing.assert_allclose(known[1:], want, atol=1e-5)
            seen += 1
    assert seen == sum(window.trained_mask.any() for (window,) in CHATS)


def test_nothing_is_compiled_again_however_rows_are_packed() -> None:
    compiled: list[str] = []
    with jax.enable_x64(True):
        made, params = trainer("tied", "float64", "none", "sft")
        state = init_state(jax.tree.map(jnp.copy, params), OPTIMIZER)
        listening(compiled)
        try:
            state, _ = made.step(state, lay_out(CHATS, [1.0] * len(CHATS), PACKED), 10.0)
            assert compiled
            compiled.clear()
            for lengths in ([LIMIT], [1] * LIMIT, [20, 20, 30, 3, 40]):
                groups = [chat(length, length) for length in lengths]
                state, _ = made.step(state, lay_out(groups, [1.0] * len(groups), PACKED), 10.0)
            assert not compiled
        finally:
            jax.monitoring.clear_event_listeners()
