"""Our own training step: every window whole, or the prefix computed once."""

import time
from statistics import median
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError

from klong_jax.core.trajectory import Window
from klong_jax.models.decoder import build
from klong_jax.parallel.aot import exhausted
from klong_jax.pipelines.bench_sft.job import Job, Outcome, Work, answer
from klong_jax.sft.loss import sft_loss
from klong_jax.training.accumulate import Trainer, init_state
from klong_jax.training.batches import Group, Layout, lay_out
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer


def contend(job: Job) -> Outcome:
    """Steps of a `Trainer`, with float32 master parameters where the computation is in bfloat16."""
    graph, params = build(job.model, 0, job.dtypes)
    optimizer = make_optimizer(OptimizerConfig())
    objective = sft_loss(graph, remat=job.way["remat"], scan_layers=job.way["scan_layers"])
    trainer = Trainer(objective, optimizer)
    state: Any = init_state(params, optimizer)
    del params
    shared = (job.work.prefix,) if job.way["shared"] else ()
    layout = Layout(job.work.prefix + job.work.window, 1, shared, trained=False)

    def step(group: Group, state: Any) -> tuple[Any, float]:
        trained = job.work.window * len(group)
        state, logs = trainer.step(state, lay_out([group], [1.0], layout), trained)
        return jax.block_until_ready(state), logs["loss"]  # type: ignore[no-untyped-call]

    group = _group(job.work, job.model.vocab_size)
    try:
        # One window is enough to warm up: however many there are, nothing is compiled again.
        state, _ = step(group[:1], state)
        times = []
        for _ in range(job.repeats):
            started = time.perf_counter()
            state, loss = step(group, state)
            times.append(time.perf_counter() - started)
    except JaxRuntimeError as error:
        if not exhausted(error):
            raise
        return Outcome(None)
    stats = jax.devices()[0].memory_stats() or {}
    return Outcome(median(times), int(stats.get("peak_bytes_in_use", 0)), loss)


def _group(work: Work, vocab: int) -> Group:
    trained = np.arange(work.prefix + work.window) >= work.prefix
    unused = np.zeros(len(trained), np.float32)
    versions = unused.astype(np.int32)
    return tuple(
        Window(
            index,
            work.prefix,
            tokens,
            trained,
            unused,
            versions,
            end=len(tokens) + index * work.window,
        )
        for index, tokens in enumerate(work.rows(vocab))
    )


if __name__ == "__main__":
    answer(contend)
