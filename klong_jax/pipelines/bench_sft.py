"""`klong bench what=sft`: steps on windows that begin alike, each whole and with the prefix once.

A step is the gradient of one trajectory and AdamW's update. The gain is held against what counting
operations says, and time and memory against the number of windows.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError

from klong_jax.core.trajectory import Window
from klong_jax.kernels.backend import platform
from klong_jax.models.config import DecoderConfig, DTypes, Remat
from klong_jax.models.cost import prefix_sharing_flops
from klong_jax.models.decoder import build
from klong_jax.models.presets import preset
from klong_jax.sft.loss import sft_loss
from klong_jax.training.accumulate import Trainer, TrainState, init_state
from klong_jax.training.batches import Layout, lay_out
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer

# The least recomputation first: the first that fits is taken.
_REMAT: tuple[Remat, ...] = ("none", "dots", "attention", "full")
_CASE = "{:>7} {:>7} {:>4}  {:<9} {:>22} {:>22} {:>6} {:>8} {:>12}"
_GROWTH = "{:>8} {:>10} {:>12} {:>12}"
_BF16 = DTypes("float32", "bfloat16")

_wait: Callable[[Any], Any] = jax.block_until_ready


@dataclass(frozen=True)
class Shape:
    """A trajectory: so many windows, of `window` tokens each behind `prefix` common ones."""

    prefix: int
    window: int
    windows: int


def run(repeats: int) -> None:
    """Prints each row as it is measured."""
    large = platform() != "cpu"
    name = "qwen3_0_6b" if large else "a small decoder"
    model = preset(name) if large else DecoderConfig(1024, 128, 2, 4, 2, 32, 384)
    dtypes = _BF16 if large else DTypes()
    print(f"sft of {name}, {dtypes.compute}, on {jax.devices()[0].device_kind}: seconds a step")
    print("(TFLOP/s of useful operations); gain of computing the prefix once, and as counted")
    print(_CASE.format("prefix", "window", "of", "remat", "whole", "prefix once", "gain", "counted",
                       "trained/s"))  # fmt: skip
    for shape in _shapes(large):
        print(_CASE.format(*_compared(model, dtypes, shape, repeats)), flush=True)
    print("\nwindows behind one prefix:")
    print(_GROWTH.format("windows", "s a step", "s a window", "MiB at most"))
    for row in _growth(model, dtypes, _shapes(large)[-1], repeats):
        print(_GROWTH.format(*row), flush=True)


def _shapes(large: bool) -> tuple[Shape, ...]:
    if large:
        return Shape(8192, 24576, 16), Shape(16384, 16384, 16)
    return Shape(64, 192, 4), Shape(128, 128, 4)


def _compared(model: DecoderConfig, dtypes: DTypes, shape: Shape, repeats: int) -> tuple[str, ...]:
    fresh = [shape.window] * shape.windows
    naive, once = prefix_sharing_flops(model, shape.prefix, fresh, prefix_trained=False)
    for remat in _REMAT:
        try:
            bench = _Bench(model, dtypes, remat)
            whole = bench.seconds(shape, 0, repeats)
            shared = bench.seconds(shape, shape.prefix, repeats)
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            continue
        return (
            str(shape.prefix),
            str(shape.window),
            str(shape.windows),
            remat,
            f"{whole:.3f} ({naive / whole / 1e12:.4g})",
            f"{shared:.3f} ({once / shared / 1e12:.4g})",
            f"{whole / shared:.3f}",
            f"{naive / once:.3f}",
            f"{shape.windows * shape.window / shared:.0f}",
        )
    return (str(shape.prefix), str(shape.window), str(shape.windows), "none fits", *[""] * 5)


def _growth(
    model: DecoderConfig, dtypes: DTypes, shape: Shape, repeats: int
) -> Iterator[tuple[str, ...]]:
    bench = _Bench(model, dtypes, "attention")
    for windows in (1, 4, 16, 64, 256) if platform() != "cpu" else (1, 2, 4):
        grown = Shape(shape.prefix, shape.window, windows)
        seconds = bench.seconds(grown, shape.prefix, repeats)
        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
        memory = f"{peak / 2**20:.0f}" if peak else "not told"
        yield str(windows), f"{seconds:.3f}", f"{seconds / windows:.4f}", memory


class _Bench:
    """A model in training."""

    def __init__(self, model: DecoderConfig, dtypes: DTypes, remat: Remat) -> None:
        self._vocab = model.vocab_size
        graph, params = build(model, 0, dtypes)
        optimizer = make_optimizer(OptimizerConfig())
        self._trainer = Trainer(sft_loss(graph, remat=remat), optimizer)
        self._state: TrainState = init_state(params, optimizer)

    def seconds(self, shape: Shape, shared: int, repeats: int) -> float:
        """Of a step, the median; its first run, which compiles, does not count."""
        group = tuple(self._windows(shape))
        layout = Layout(shape.prefix + shape.window, 1, shared, trained=False)
        times = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            self._state, _ = self._trainer.step(self._state, lay_out([group], [1.0], layout), 1e6)
            _wait(self._state)
            times.append(time.perf_counter() - started)
        return median(times[1:])

    def _windows(self, shape: Shape) -> Iterator[Window]:
        rng = np.random.default_rng(0)
        prefix = rng.integers(0, self._vocab, shape.prefix, np.int32)
        trained = np.arange(shape.prefix + shape.window) >= shape.prefix
        unused = np.zeros(len(trained), np.float32)
        for index in range(shape.windows):
            own = rng.integers(0, self._vocab, shape.window, np.int32)
            tokens = np.concatenate([prefix, own])
            versions, end = unused.astype(np.int32), len(tokens) + index * shape.window
            yield Window(index, shape.prefix, tokens, trained, unused, versions, end)
