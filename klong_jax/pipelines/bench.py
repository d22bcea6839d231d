"""`klong bench`: kernels beside their peers and bare matmuls; training steps; sandboxes."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from klong_jax.kernels.backend import use_kernels
from klong_jax.kernels.cases import CASES, Case, Work
from klong_jax.pipelines.bench_sandbox import run as sandboxes
from klong_jax.pipelines.bench_sft import run as training
from klong_jax.pipelines.config.commands import BenchConfig

_LEAST_SECONDS, _MOST_CALLS = 0.03, 200

_wait: Callable[[Any], Any] = jax.block_until_ready

_ROW = "{:<44} {:>22} {:>22} {:>12} {:>8}  {:<36} {:>11}"
_HEADINGS = ("case", "ours", "limit", "ours/limit", "MiB", "peer", "ours/peer")


@dataclass(frozen=True)
class Measured:
    """How a function ran.

    Attributes:
        seconds: Of a call, in the median round.
        tflops: Useful operations a second, in 10^12.
        temporaries: Bytes it needed beside arguments and results.
    """

    seconds: float
    tflops: float
    temporaries: int

    def __str__(self) -> str:
        return f"{self.tflops:.3g} ({self.seconds * 1e3:.3g} ms)"


def run(settings: BenchConfig) -> None:
    """Prints each case as it is measured."""
    if settings.what == "sft":
        training.run(settings.table, settings.repeats)
        return
    if settings.what == "sandbox":
        sandboxes.run(settings.repeats)
        return
    print(f"{settings.what} on {jax.devices()[0].device_kind}: TFLOP/s of useful operations (time)")
    print("limit: bare matrix multiplications; MiB: what ours needs beside arguments and results")
    print(_ROW.format(*_HEADINGS))
    backends = {settings.what: settings.backend} if settings.backend else {}
    with use_kernels(**backends):
        for case in CASES[settings.what]():
            for row in rows(case, settings.repeats):
                print(_ROW.format(*row), flush=True)


def rows(case: Case, repeats: int) -> Iterator[tuple[str, ...]]:
    """The cells of a case and a peer each; of the case alone if it has none."""
    ours, limit = measure(case.ours, repeats), measure(case.limit, repeats)
    share, size = f"{ours.tflops / limit.tflops:.0%}", f"{ours.temporaries / 2**20:.0f}"
    first = case.name, str(ours), str(limit), share, size
    if not case.peers:
        yield (*first, "none", "")
    for name, work in case.peers.items():
        try:
            peer = measure(work, repeats)
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield (*first, f"{name} out of memory", "")
        else:
            yield (*first, f"{name} {peer}", f"{ours.tflops / peer.tflops:.2f}")


def measure(work: Work, repeats: int) -> Measured:
    """Compiles, runs once, then takes the median of several rounds.

    A round is as many calls as take a while: they are queued, so that the device does not wait for
    a call to be started.
    """
    compiled: Any = jax.jit(work.function).lower(*work.arguments).compile()

    def seconds_of(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = compiled(*work.arguments)
        _wait(out)
        return (time.perf_counter() - start) / calls

    seconds_of(1)
    calls = max(1, min(_MOST_CALLS, int(_LEAST_SECONDS / seconds_of(1))))
    seconds = median(seconds_of(calls) for _ in range(repeats))
    memory: Any = compiled.memory_analysis()
    return Measured(seconds, work.flops / seconds / 1e12, int(memory.temp_size_in_bytes))
