"""What the machine can do at most: bare matrix multiplications in the compute dtype."""

import time
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from klong_jax.pipelines.bench_sft.job import Job, Outcome, answer

_CALLS = 20


def contend(job: Job) -> Outcome:
    """Seconds of a product of two matrices of `window` rows and columns."""
    size = job.work.window
    keys = jax.random.split(jax.random.key(0))
    one, other = (jax.random.normal(key, (size, size), job.dtypes.compute) for key in keys)
    product: Any = jax.jit(jnp.matmul)
    wait: Any = jax.block_until_ready
    wait(product(one, other))
    times = []
    for _ in range(job.repeats):
        started = time.perf_counter()
        # They are queued, so that the device does not wait for a call to be started.
        for _ in range(_CALLS):
            out = product(one, other)
        wait(out)
        times.append((time.perf_counter() - started) / _CALLS)
    return Outcome(median(times))


if __name__ == "__main__":
    answer(contend)
