"""`klong bench what=sft`: training steps beside their peers, each measurement in its own process.

A step is the gradient of one trajectory and AdamW's update. Each contender runs in the ways that
its settings offer; the fastest that fits counts. Useful operations are counted, attention causally,
and held against bare matrix multiplications on the same machine.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from klong_jax.models.config import DecoderConfig, DTypes
from klong_jax.models.cost import forward_flops, layer_matrices, parameters, prefix_sharing_flops
from klong_jax.models.presets import preset
from klong_jax.pipelines.bench_sft.job import Job, Outcome, Work

Way = dict[str, Any]

_OURS: tuple[Way, ...] = (
    {"remat": "none", "scan_layers": False, "shared": False},
    {"remat": "dots", "scan_layers": False, "shared": False},
    {"remat": "attention", "scan_layers": True, "shared": False},
    {"remat": "full", "scan_layers": True, "shared": False},
)
_TORCH: tuple[Way, ...] = (
    {"checkpointing": False, "compile": False},
    {"checkpointing": True, "compile": False},
    {"checkpointing": False, "compile": True},
    {"checkpointing": True, "compile": True},
)
_TUNIX: tuple[Way, ...] = ({"remat": "NONE"}, {"remat": "BLOCK"}, {"remat": "DECODER"})

_PACKAGES = {"transformers_torch": "torch", "tunix": "tunix"}
_STEP = "  {:<19} {:<46} {:>12} {:>9} {:>8} {:>9} {:>6}"
_HEADINGS = ("contender", "settings", "s a step", "tokens/s", "TFLOP/s", "of limit", "GiB")
_GROWTH = "{:>8} {:>10} {:>12} {:>8}"


@dataclass(frozen=True)
class Sizes:
    """What is timed.

    Attributes:
        model: The decoder of all tables but the mixture's.
        also: A larger one whose gain of sharing is counted, too.
        mixture: A decoder with experts, of so many layers; the first that fits is taken.
        dtypes: Of parameters and computation.
        windows: Lengths of single windows, trained in full.
        trajectories: Steps on windows that begin alike.
        growth: One window of a growing trajectory, and how many.
        longest: Single windows, to see what fits.
        matrix: Side of the matrices that show what the machine can do.
    """

    model: DecoderConfig
    also: DecoderConfig
    mixture: tuple[DecoderConfig, ...]
    dtypes: DTypes
    windows: tuple[int, ...]
    trajectories: tuple[Work, ...]
    growth: tuple[Work, tuple[int, ...]]
    longest: tuple[int, ...]
    matrix: int


def sizes(platform: str) -> Sizes:
    """Qwen3-0.6B on an accelerator, something tiny on a CPU."""
    mixture = preset("qwen3_30b_a3b")
    if platform == "cpu":
        small = DecoderConfig(1024, 128, 2, 4, 2, 32, 384)
        assert mixture.moe is not None
        experts = replace(small, moe=replace(mixture.moe, num_experts=8, top_k=2, expert_size=64))
        growth = Work(64, 64), (1, 3)
        trajectories = Work(64, 192, 4), Work(128, 128, 4)
        return Sizes(
            small, small, (experts,), DTypes(), (256,), trajectories, growth, (512,), 512
        )  # fmt: skip
    return Sizes(
        preset("qwen3_0_6b"),
        preset("qwen3_8b"),
        tuple(replace(mixture, num_layers=layers) for layers in (8, 6, 4, 2)),
        DTypes("float32", "bfloat16"),
        (8192, 32768),
        (Work(8192, 24576, 16), Work(16384, 16384, 16)),
        (Work(8192, 8192), (1, 4, 16, 64, 256)),
        (131_072, 262_144),
        8192,
    )


def run(table: str | None, repeats: int) -> None:
    """Prints each row as it is measured.

    Args:
        table: One of TABLES; all if None.
        repeats: Steps whose median counts.
    """
    bench = Bench(sizes(_platform()), repeats)
    for name, printed in TABLES.items():
        if table in (None, name):
            printed(bench)


def _windows(bench: "Bench") -> None:
    for length in bench.sizes.windows:
        work = Work(0, length)
        flops = 3 * forward_flops(bench.sizes.model, 1, length, 0, length)
        bench.title(f"one window of {length} tokens, all trained")
        ours = bench.fastest("ours", work, _OURS, flops)
        for peer, ways in {"transformers_torch": _TORCH, "tunix": _TUNIX}.items():
            bench.beside(ours, bench.fastest(peer, work, ways, flops), peer)


def _trajectories(bench: "Bench") -> None:
    for work in bench.sizes.trajectories:
        fresh = [work.window] * work.windows
        naive, once = (
            prefix_sharing_flops(model, work.prefix, fresh, prefix_trained=False)
            for model in (bench.sizes.model, bench.sizes.also)
        )
        bench.title(
            f"{work.windows} windows of {work.window} tokens after {work.prefix} common ones"
        )
        whole = bench.fastest("ours", work, _OURS, naive[0])
        shared = bench.fastest("ours", work, [{**way, "shared": True} for way in _OURS], naive[1])
        if whole and shared:
            gain, counted = whole / shared, naive[0] / naive[1]
            print(
                f"  the prefix once: {gain:.3f} times as fast; counting operations says "
                f"{counted:.3f}, so {gain / counted:.1%} of it (for the larger model counting "
                f"says {once[0] / once[1]:.3f})"
            )
        peer = bench.fastest("transformers_torch", work, _TORCH, naive[0])
        bench.beside(shared, peer, "transformers_torch")


def _growth(bench: "Bench") -> None:
    one, counts = bench.sizes.growth
    bench.title(f"windows of {one.window} tokens after {one.prefix} common ones", columns=False)
    print(_GROWTH.format("windows", "s a step", "s a window", "GiB"))
    for count in counts:
        way = {**_OURS[1], "shared": True}
        outcome = bench.measure("ours", replace(one, windows=count), way)
        seconds = outcome.seconds
        cells = (f"{seconds:.3f}", f"{seconds / count:.4f}") if seconds else ("does not fit", "")
        print(_GROWTH.format(count, *cells, _gib(outcome.peak)), flush=True)


def _longest(bench: "Bench") -> None:
    bench.title("long single windows, all trained, with AdamW's states on the device")
    for length in bench.sizes.longest:
        flops = 3 * forward_flops(bench.sizes.model, 1, length, 0, length)
        for way in _OURS[2:]:
            outcome = bench.row("ours", Work(0, length), way, flops, repeats=1)
            if outcome.seconds:
                break


def _mixture(bench: "Bench") -> None:
    for model in bench.sizes.mixture:
        one = bench.sizes.growth[0]
        work = Work(0, one.prefix + one.window)
        flops = 3 * forward_flops(model, 1, work.window, 0, work.window)
        active = layer_matrices(model, active=True) / 1e9
        bench.title(
            f"experts, {model.num_layers} layers, {parameters(model) / 1e9:.2f} billion parameters "
            f"({active:.2f} active in the layers), one window of {work.window}"
        )
        if bench.fastest("ours", work, _OURS, flops, model):
            return


TABLES: dict[str, Callable[["Bench"], None]] = {
    "windows": _windows,
    "trajectories": _trajectories,
    "growth": _growth,
    "longest": _longest,
    "mixture": _mixture,
}
"""The tables by name."""


class Bench:
    """Starts contenders and prints what they say."""

    def __init__(self, sizes: Sizes, repeats: int) -> None:
        self.sizes, self._repeats = sizes, repeats

    def title(self, text: str, *, columns: bool = True) -> None:
        """Begins a table."""
        print(f"\n{text}")
        if columns:
            print(_STEP.format(*_HEADINGS), flush=True)

    @cached_property
    def limit(self) -> float:
        """Operations a second of bare matrix multiplications."""
        side = self.sizes.matrix
        seconds = self.measure("limit", Work(0, side), {}).seconds
        assert seconds is not None
        return 2 * side**3 / seconds

    def fastest(
        self,
        contender: str,
        work: Work,
        ways: Sequence[Way],
        flops: float,
        model: DecoderConfig | None = None,
    ) -> float | None:
        """Seconds of the fastest way; None if none fits or the contender is not installed.

        Ways are sorted by what they need: after two that fit, less is no faster.
        """
        if (package := _PACKAGES.get(contender)) and find_spec(package) is None:
            print(_STEP.format(contender, "not installed", *[""] * 5))
            return None
        found: list[float] = []
        for way in ways:
            outcome = self.row(contender, work, way, flops, model)
            if outcome.seconds:
                found.append(outcome.seconds)
            if len(found) == 2 and contender == "ours":
                break
        return min(found, default=None)

    def row(
        self,
        contender: str,
        work: Work,
        way: Way,
        flops: float,
        model: DecoderConfig | None = None,
        repeats: int | None = None,
    ) -> Outcome:
        """Measures and prints."""
        outcome = self.measure(contender, work, way, model, repeats)
        cells = [outcome.failure or "does not fit", *[""] * 4]
        if seconds := outcome.seconds:
            tokens = work.windows * (work.prefix + work.window)
            rate = flops / seconds
            cells = [f"{seconds:.4f}", f"{tokens / seconds:.0f}", f"{rate / 1e12:.4g}",
                     f"{rate / self.limit:.1%}", _gib(outcome.peak)]  # fmt: skip
        settings = " ".join(f"{name}={value}" for name, value in way.items())
        print(_STEP.format(contender, settings, *cells), flush=True)
        return outcome

    def beside(self, ours: float | None, theirs: float | None, peer: str) -> None:
        """Prints how much faster ours is."""
        if ours and theirs:
            print(f"  ours is {theirs / ours:.2f} times as fast as {peer}", flush=True)

    def measure(
        self,
        contender: str,
        work: Work,
        way: Way,
        model: DecoderConfig | None = None,
        repeats: int | None = None,
    ) -> Outcome:
        """Runs a contender in a process of its own, so that memory and settings are its own."""
        job = Job(model or self.sizes.model, work, way, repeats or self._repeats, self.sizes.dtypes)
        module = f"klong_jax.pipelines.bench_sft.{contender}"
        # By itself JAX takes three quarters of a GPU's memory, and torch what it needs.
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94", **os.environ}
        done = subprocess.run(
            [sys.executable, "-m", module, job.to_json()],
            capture_output=True,
            text=True,
            env=environment,
        )
        if done.returncode:
            # JAX explains its tracebacks in the lines after the error.
            lines = [line for line in done.stderr.splitlines() if "Error" in line]
            return Outcome(None, failure=lines[-1] if lines else f"exit code {done.returncode}")
        return Outcome(**json.loads(done.stdout.strip().splitlines()[-1]))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}" if size else "-"


def _platform() -> str:
    """Asked in another process: one that holds the device would leave none to the contenders."""
    script = "import jax; print(jax.default_backend())"
    return subprocess.check_output([sys.executable, "-c", script], text=True).strip()
