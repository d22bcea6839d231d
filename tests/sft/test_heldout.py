"""The held-out loss is that of training, token by token, also where in a trajectory it arises."""

import jax
import numpy as np
import pytest
from flax import nnx

from klong_jax.core.trajectory import Turn
from klong_jax.models.config import DecoderConfig
from klong_jax.models.decoder import build
from klong_jax.sft.data import WindowDataset
from klong_jax.sft.heldout import HeldOut, losses_by_position
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.splitting.recorded import SplitOptions, SplitRecording, split_recorded

GRAPH, PARAMS = build(DecoderConfig(30, 16, 2, 2, 1, 8, 32), 0)
LENGTH = 16


def recording(turns: int, seed: int, fade: tuple[int, ...] = ()) -> SplitRecording:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 30, (turns, 2, 3)).tolist()
    said = tuple(Turn(tuple(suffix), tuple(output)) for suffix, output in ids)
    policy = ContextPolicy(LENGTH, 7, 3, fade=fade, marker=(29,))
    return split_recorded(said, 2, policy, SplitOptions(), "test")


def by_hand(made: SplitRecording) -> dict[int, tuple[float, int]]:
    """Each trained token's loss and window by its position, found by searching for its window."""
    decoder = nnx.merge(GRAPH, PARAMS)
    logprobs = []
    for window in made.windows():
        padded = np.pad(window.tokens, (0, LENGTH - len(window.tokens)))
        hidden = decoder.apply(padded[None])[0, : len(window.tokens)]
        logprobs.append(np.asarray(jax.nn.log_softmax(hidden @ decoder.output_embedding.T)))
    ends = np.cumsum([[len(turn.suffix_ids), len(turn.output_ids)] for turn in made.turns])
    found = {}
    for position in range(1, int(ends[-1])):
        if np.searchsorted(ends, position, side="right") % 2 == 0:
            continue  # the environment's
        (index,) = (i for i, s in enumerate(made.spans) if s.fresh_from <= position < s.end)
        (place,) = np.flatnonzero(made.spans[index].positions() == position)
        token = made.windows()[index].tokens[place]
        found[position] = -float(logprobs[index][place - 1, token]), index
    return found


@pytest.mark.parametrize("fade", [(), (1,)])
def test_losses_are_means_over_trained_tokens_of_all_of_late_windows_and_of_stretches(
    fade: tuple[int, ...],
) -> None:
    made = [recording(7, 0, fade), recording(1, 1), recording(1, 2), recording(2, 3)]
    assert any(span.left_out for span in made[0].spans) == bool(fade)
    tokens = [token for one in map(by_hand, made) for token in one.items()]
    half = -(-len(made[0].spans) // 2)
    late = [loss for _, (loss, index) in tokens if index >= half]
    expected = {
        "heldout_loss": pytest.approx(np.mean([loss for _, (loss, _) in tokens]), rel=1e-5),
        "heldout_late_loss": pytest.approx(np.mean(late), rel=1e-5),
    }
    for start in (2, 4, 8, 16, 32):
        here = [loss for position, (loss, _) in tokens if start <= position < 2 * start]
        expected[f"heldout_loss_from_{start}"] = pytest.approx(np.mean(here), rel=1e-5)
        expected[f"heldout_tokens_from_{start}"] = len(here)
    windows = [window for one in made for window in one.windows()]
    for pack in (False, True):
        data = WindowDataset("x", tuple(one.windows() for one in made), LENGTH, pack=pack)
        rows = data.layout(4).arrange(windows, [1.0] * len(windows)).tokens
        assert (len(rows) < len(windows)) == pack, "several windows share a row"
        losses = HeldOut(data, GRAPH, 4).losses(PARAMS)
        assert losses == expected
        assert [start for start, _, _ in losses_by_position(losses)] == [2, 4, 8, 16, 32]
        assert sum(count for _, _, count in losses_by_position(losses)) == len(tokens)


def test_trajectories_of_one_window_have_no_late_ones() -> None:
    data = WindowDataset("x", (recording(1, 9).windows(),), LENGTH)
    losses = HeldOut(data, GRAPH, 2).losses(PARAMS)
    assert "heldout_late_loss" not in losses
