"""The SFT run: phases of data, from short conversations to windows of long trajectories."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from klong_jax.sft.data import WindowDataset
from klong_jax.sft.heldout import HeldOut
from klong_jax.training.accumulate import Trainer, TrainState
from klong_jax.training.average import served_params
from klong_jax.training.batches import lay_out
from klong_jax.training.checkpoint import Checkpoints
from klong_jax.training.metrics import MetricsLog
from klong_jax.training.throughput import Meter, padding_share


@dataclass(frozen=True)
class Phase:
    """One part of the run.

    Attributes:
        data: What is trained on.
        steps: Optimiser steps.
        batch: Groups of windows a step.
        micro_batch: Rows of windows, or groups that share a prefix, a gradient call.
    """

    data: WindowDataset
    steps: int
    batch: int
    micro_batch: int


def run_sft(
    phases: Sequence[Phase],
    state: TrainState,
    trainer: Trainer,
    checkpoints: Checkpoints,
    metrics: MetricsLog,
    meter: Meter,
    *,
    seed: int,
    save_every: int,
    on_step: Callable[[dict[str, Any]], None],
    asked_to_stop: Callable[[], bool],
    heldout: HeldOut | None = None,
) -> TrainState:
    """Trains through all phases, from the last checkpoint on, until done or asked to stop.

    What a step trains on follows from the seed and the step's number, so a run that was killed
    goes on with exactly the windows it would have seen.

    Args:
        phases: The parts in order.
        state: A fresh state.
        trainer: Takes the optimiser steps.
        checkpoints: Where the run is saved.
        metrics: Where a row a step goes.
        meter: Says how fast a step was.
        seed: Seeds the order of the data.
        save_every: Steps between checkpoints.
        on_step: Called with each row.
        asked_to_stop: Called after each step; if so, the step is saved and the run ends.
        heldout: What the policy is judged by at each checkpoint; if None, by its last batch.
    """
    if checkpoints.latest() is not None:
        state, _ = checkpoints.restore(state)
    first = 0
    for phase in phases:
        for index in range(max(0, int(state.step) - first), phase.steps):
            started = time.monotonic()
            position = index * phase.batch
            groups = phase.data.batch(position, phase.batch, seed)
            windows = [window for group in groups for window in group]
            trained = sum(int(window.trained_mask.sum()) for window in windows)
            layout = phase.data.layout(phase.micro_batch)
            batches = list(lay_out(groups, [1.0] * len(groups), layout))
            waited = time.monotonic() - started
            state, logs = trainer.step(state, batches, trained)
            seconds = time.monotonic() - started
            step = first + index + 1
            saving = step % save_every == 0 or index + 1 == phase.steps
            judged = (
                heldout.losses(served_params(state.params, state.opt_state))
                if heldout and saving
                else {}
            )
            row = {
                "step": step,
                "phase": phase.data.name,
                "windows": len(windows),
                "trained_tokens": trained,
                "padding_share": padding_share(batches),
                **logs,
                **judged,
                "seconds": seconds,
                **meter.rates(groups, layout, seconds, waited),
            }
            metrics.write(row)
            on_step(row)
            stopping = asked_to_stop()
            if stopping or saving:
                progress = {"phase": phase.data.name, "position": position + phase.batch}
                loss = judged.get("heldout_loss") if heldout else logs["loss"]
                checkpoints.save(state, {"data": progress, "seed": seed}, loss=loss)
            if stopping:
                return state
        first += phase.steps
    return state
