"""Programs compiled by the TPU's compiler for slices that are not here: what fits, and what not."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from klong_jax.models.config import DecoderConfig
from klong_jax.models.cost import kept_numbers

GIB = r"([\d.]+) GiB"


@pytest.fixture(autouse=True)
def libtpu() -> None:
    if importlib.util.find_spec("libtpu") is None:
        message = "libtpu is not installed (pip install klong-jax[tpu])"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's least effort: a fifth of the time; what runs by night is compiled as ever."""
    if request.node.get_closest_marker("nightly") is None:
        monkeypatch.setenv("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1")


def aot(
    *arguments: str, program: tuple[str, ...] = ("-m", "klong_jax.cli")
) -> tuple[int, str, str]:
    """Exit status, output and errors of `klong aot`."""
    done = subprocess.run(
        [sys.executable, *program, "aot", *arguments],
        env=os.environ | {"COLUMNS": "160"},
        text=True,
        capture_output=True,
    )
    print(done.stdout)
    return done.returncode, done.stdout, done.stderr


def peaks(out: str) -> list[float]:
    return [float(peak) for peak in re.findall(rf"peak +│ {GIB} of", out)]


@pytest.mark.slow
def test_memory_is_what_the_compiler_says_and_collectives_are_found() -> None:
    script = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from klong_jax.parallel.aot import compile_ahead
from klong_jax.parallel.mesh import MeshShape, make_mesh
from klong_jax.parallel.topology import parse_topology
jax.config.update("jax_platforms", "cpu")
mesh = make_mesh(MeshShape(fsdp=4), parse_topology("v5e:2x2").devices())
cut = NamedSharding(mesh, P("fsdp"))
shapes = [(4096, 1024), (1024, 512)]
x, w = (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=cut) for shape in shapes)
lowered = jax.jit(lambda x, w: x @ w, out_shardings=cut).lower(x, w)
memory = (program := compile_ahead(lowered, mesh.shape)).memory
assert memory.arguments == (4096 * 1024 + 1024 * 512), memory
assert memory.outputs == 4096 * 512, memory
assert memory.arguments + memory.outputs <= memory.total < 2**26, memory
assert {one.axes for one in program.collectives} == {"fsdp"}, program
sent = sum(one.sent_bytes * one.times for one in program.collectives)
assert 0 < sent <= 4 * 1024 * 512, sent
"""
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_glm_air_decodes_64_sequences_of_128k_on_64_v5p() -> None:
    status, out, _ = aot(
        "model=glm45_air", "topology=v5p:4x4x4", "step=decode", "rows=64",
        "mesh.expert=8", "mesh.tensor=8",
    )  # fmt: skip
    assert status == 0
    # A 64th of the weights in bf16 and of the cache is there at least.
    weights, cache = 2 * 106.9e9 / 64, 64 * 131072 * 46 * 8 * 128 * 2 * 2 / 64
    assert weights + cache < peaks(out)[0] * 2**30 < 40 * 2**30


@pytest.mark.slow
def test_a_dense_model_trains_on_a_small_slice() -> None:
    status, out, _ = aot("model=qwen3_0_6b", "topology=v5e:2x2", "prefix=0", "window=4096")
    assert status == 0
    assert len(peaks(out)) == 2
    assert max(peaks(out)) < 15.75


SMALL = """
from klong_jax import cli
from klong_jax.models.config import DecoderConfig
from klong_jax.models.presets import PRESETS
PRESETS["small"] = DecoderConfig(1024, 256, 2, 4, 2, 64, 512)
cli.main()
"""


@pytest.mark.slow
def test_a_prefix_that_is_computed_once_is_counted_with_what_it_keeps() -> None:
    status, out, err = aot(
        "model=small", "topology=v5e:2x2", "mesh.context=2", "remat=none",
        "prefix=512", "window=512", "shared_prefix=512", "together=8", program=("-c", SMALL),
    )  # fmt: skip
    assert status == 0, err
    whole, read, after, back, _ = peaks(out)
    # Beside a window is what the prefix keeps for its backward pass, of a fourth of its tokens.
    beside = [float(size) for size in re.findall(rf"state beside it +│ {GIB}", out)]
    kept = 2 * 512 / 4 * 2 * kept_numbers(DecoderConfig(1024, 256, 2, 4, 2, 64, 512), "none")
    assert kept < (beside[2] - beside[0]) * 2**30
    least = [float(time) for time in re.findall(r"least time +│ ([\d.]+) ms", out)]
    rows = re.findall(rf"│ (?:computed whole|512 tokens once) +│ {GIB} +│ ([\d.]+) ms", out)
    (peak, seconds), (shared_peak, shared_seconds) = (map(float, row) for row in rows)
    assert (peak, shared_peak) == (whole, max(read, after, back))
    assert seconds == pytest.approx(8 * least[0], rel=0.01)
    assert shared_seconds == pytest.approx(least[1] + 8 * least[2] + least[3], rel=0.01)


@pytest.mark.slow
def test_what_does_not_fit_is_explained_and_exits_with_1() -> None:
    status, out, _ = aot("model=qwen3_8b", "topology=v5e:2x2", "step=decode", "rows=16")
    assert status == 1
    assert "does not fit" in out
    assert "largest buffers" in out
    # The cache: layers, rows of a device, positions, heads, width.
    assert "bf16[36,4,131072,8,128]" in out


def test_a_mesh_that_does_not_fill_the_slice_or_divide_the_model_is_named() -> None:
    status, _, err = aot("topology=v5p:2x2x2", "mesh.fsdp=3")
    assert status == 2
    assert "fsdp 3 takes 3 devices, but there are 8" in err
    status, _, err = aot("model=glm45_air", "topology=v5p:2x2x4", "step=decode", "mesh.tensor=16")
    assert status == 2
    assert "mesh.tensor=16 does not divide dimension 3 (kv_heads, size 8) of the cache" in err


@pytest.mark.nightly
@pytest.mark.parametrize("step", ["sft", "rl"])
def test_qwen3_8b_trains_on_128k_windows_on_64_v5e(step: str) -> None:
    status, out, _ = aot("model=qwen3_8b", "topology=v5e:8x8", "mesh.context=16", f"step={step}")
    assert status == 0
    assert max(peaks(out)) < 15.75


@pytest.mark.nightly
@pytest.mark.parametrize("step", ["sft", "rl"])
def test_qwen3_8b_trains_on_128k_windows_behind_one_prefix_on_64_v5e(step: str) -> None:
    status, out, _ = aot(
        "model=qwen3_8b", "topology=v5e:8x8", "mesh.context=16", f"step={step}",
        "shared_prefix=32768",
    )  # fmt: skip
    assert status == 0
    assert len(peaks(out)) == 5
    assert max(peaks(out)) < 15.75


@pytest.mark.nightly
@pytest.mark.parametrize("step", ["sft", "rl"])
def test_glm_air_trains_on_128k_windows_on_256_v5p(step: str) -> None:
    status, out, _ = aot(
        "model=glm45_air", "topology=v5p:4x8x8", "mesh.expert=16", "mesh.context=16", f"step={step}"
    )
    assert status == 0
    assert max(peaks(out)) < 95.74
