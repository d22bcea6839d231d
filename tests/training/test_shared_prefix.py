"""Computing a common prefix once changes nothing but the work: the gradient is naive training's."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gradients import LIMIT, MIXTURE, MODELS, OPTIMIZER, VOCAB, gradients, listening, off
from hypothesis import given, settings
from hypothesis import strategies as st

from klong_jax.core.trajectory import Turn, cut_window, token_stream
from klong_jax.models.decoder import abstract, build
from klong_jax.models.routing import EXPERT_LOADS
from klong_jax.sft.loss import sft_loss
from klong_jax.splitting.policy import ContextPolicy, split
from klong_jax.training.accumulate import Trainer, init_state
from klong_jax.training.batches import Group, Layout, lay_out


def group(
    turns: int, seed: int, prefix_len: int = 17, overlap: int = 9, reading: bool = True
) -> Group:
    """The windows of a random trajectory; if `reading`, some sampled tokens are pinned too."""
    rng = np.random.default_rng(seed)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, VOCAB, rng.integers(1, most)).tolist())

    def logprobs(output: tuple[int, ...]) -> tuple[float, ...]:
        return tuple((-3 - rng.random(len(output))).tolist())

    said = [ids(5) for _ in range(turns)]
    first = (*ids(5),) if reading else tuple(rng.integers(0, VOCAB, prefix_len).tolist())
    suffixes = [first, *(ids(6) for _ in said[1:])]
    prefix_len = min(prefix_len, sum(map(len, (*suffixes, *said))))
    recording = tuple(
        Turn(suffix, output, logprobs(output))
        for suffix, output in zip(suffixes, said, strict=True)
    )
    spans = split(recording, prefix_len, ContextPolicy(LIMIT, overlap, 6))
    stream = token_stream(recording)
    return tuple(cut_window(index, span, *stream) for index, span in enumerate(spans))


def shared(*tokens: int, rows: int = 2) -> Layout:
    """So many tokens at the front are computed once a group."""
    return Layout(LIMIT, rows, tokens)


GROUPS = [group(20, 0), group(5, 1), group(12, 2), group(14, 3, reading=False)]
CASES: list[dict[str, str]] = [
    {"model": "tied", "dtype": "float64", "remat": "dots", "objective": "rl"},
    {"model": "mixture", "dtype": "float64", "remat": "attention", "objective": "sft"},
    {"model": "mixture", "dtype": "float32", "remat": "full", "objective": "sft"},
]


def counted(groups: Sequence[Group], shared: int) -> int:
    """Tokens up to the last that is trained; of what is shared all, once a group."""
    ends = [
        int(np.flatnonzero(window.trained_mask).max(initial=-1)) + 1
        for group in groups
        for window in group
    ]
    return shared * len(groups) + sum(max(0, end - shared) for end in ends)


def test_the_gradient_is_that_of_whole_windows(measured: Callable[[str], None]) -> None:
    assert [len(one) for one in GROUPS] != [1, 1, 1, 1]
    assert GROUPS[0][0].trained_mask[:16].any()
    rows = []
    for case in CASES:
        whole, logs = gradients(GROUPS, shared(0), **case)
        # In threes, four groups leave rows of padding.
        found, shared_logs = gradients(GROUPS, shared(16, rows=3), **case)
        loads, shared_loads = logs.pop(EXPERT_LOADS, None), shared_logs.pop(EXPERT_LOADS, None)
        if loads is not None:
            assert shared_logs.keys() == logs.keys()
            assert loads.sum(axis=1).tolist() == [MIXTURE.top_k * counted(GROUPS, 0)] * 2
            assert shared_loads.sum(axis=1).tolist() == [MIXTURE.top_k * counted(GROUPS, 16)] * 2
        rows.append((case, off(found, whole), off(list(shared_logs.values()), list(logs.values()))))
    measured(f"{'model':8} {'dtype':8} {'remat':10} {'loss':5} {'gradients':>10} {'sums':>8}")
    for case, grads, sums in rows:
        named = "{model:8} {dtype:8} {remat:10} {objective:5}".format(**case)
        measured(f"{named} {grads:10.1e} {sums:8.1e}")
    for case, grads, sums in rows:
        limit = 1e-12 if case["dtype"] == "float64" else 1e-6
        assert grads < limit, case
        assert sums < limit, case


@settings(max_examples=25)
@given(
    shapes=st.lists(
        st.tuples(st.integers(2, 24), st.integers(8, 30), st.integers(0, 20), st.booleans()),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 2**32 - 1),
    tokens=st.sampled_from([(8,), (16,), (8, 16)]),
)
def test_any_trajectories_give_the_gradient_of_whole_windows(
    shapes: list[tuple[int, int, int, bool]], seed: int, tokens: tuple[int, ...]
) -> None:
    """Prefixes shorter and longer than what is shared, ragged windows, any number of them."""
    groups = [
        group(turns, seed + number, prefix_len, overlap, reading)
        for number, (turns, prefix_len, overlap, reading) in enumerate(shapes)
    ]
    whole, logs = gradients(groups, shared(0))
    found, shared_logs = gradients(groups, shared(*tokens))
    assert off(found, whole) < 1e-12
    assert float(shared_logs["loss"]) == pytest.approx(float(logs["loss"]), rel=1e-12)


def test_the_gradient_is_taken_of_what_is_learnt_alone() -> None:
    frozen = ("embedding", "blocks.query.*", "blocks.up.*", "*.scale")
    names = [".".join(path) for path, _ in nnx.to_flat_state(abstract(MODELS["tied"])[1])]
    learnt = [not any(fnmatchcase(name, pattern) for pattern in frozen) for name in names]
    assert 0 < sum(learnt) < len(names)
    # One group is of a prefix too short to be shared.
    groups = [*GROUPS, group(9, 7, prefix_len=10)]
    everything, logs = gradients(groups, shared(16, rows=3), **CASES[0])
    found, own_logs = gradients(groups, shared(16, rows=3), frozen=frozen, **CASES[0])
    expected = [grad for grad, one in zip(everything, learnt, strict=True) if one]
    assert [grad.shape for grad in found] == [grad.shape for grad in expected]
    assert off(found, expected) < 1e-12
    assert off(list(own_logs.values()), list(logs.values())) < 1e-12


def test_nothing_is_compiled_again_however_many_windows_there_are() -> None:
    graph, params = build(MODELS["tied"], 0)
    made = Trainer(sft_loss(graph, remat="full"), OPTIMIZER)
    state = init_state(jax.tree.map(jnp.copy, params), OPTIMIZER)
    layout = shared(16)
    compiled: list[str] = []

    listening(compiled)
    try:
        # One group is of a prefix too short to be shared.
        first = [group(9, 7), group(4, 8, prefix_len=10)]
        state, _ = made.step(state, lay_out(first, [1.0, 1.0], layout), 10.0)
        assert compiled
        compiled.clear()
        for turns in (2, 30, 13):
            groups = [group(turns, turns), group(turns + 5, 1), group(6, 2, prefix_len=11)]
            state, _ = made.step(state, lay_out(groups, [1.0] * 3, layout), 10.0)
        assert not compiled
    finally:
        jax.monitoring.clear_event_listeners()
