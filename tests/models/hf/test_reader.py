"""Reading onto a mesh: the right values in the right places, and little memory on the way."""

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
from hf_models import INDEX, make

from klong_jax.core.jsonio import write_json
from klong_jax.models.config import DecoderConfig
from klong_jax.models.families.qwen3 import QWEN3
from klong_jax.models.hf.directory import wanted_shapes

MB = 1 << 20
LAYERS = 48


def on_mesh(*arguments: str | Path) -> str:
    script = Path(__file__).with_name("on_mesh.py")
    # Freed buffers go back to the kernel at once: what is measured is what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MB)}
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_each_device_gets_its_part_of_every_parameter(tmp_path: Path) -> None:
    kinds = ("qwen3 tied", "glm4_moe")
    numbers = {"vocab_size": 96}  # divisible by the meshes
    on_mesh("equal", *(make(kind, tmp_path / kind, **numbers) for kind in kinds))


def hollow_model(folder: Path) -> int:
    """A model of zeros that takes no space on disk, in a file a layer; gives its size."""
    config = DecoderConfig(1024, 1024, LAYERS, 16, 16, 64, 1024, tie_embeddings=False)
    folder.mkdir()
    write_json(folder / "config.json", QWEN3.config_to_hf(config))
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in wanted_shapes(config, tuple(QWEN3.tensors(config))):
        layer = name.split(".")[2] if ".layers." in name else "top"
        files.setdefault(f"{layer}.safetensors", {})[name] = shape
    total = 0
    for file, shapes in files.items():
        header, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + end)
        total += end
    placed = {name: file for file, shapes in files.items() for name in shapes}
    write_json(folder / INDEX, {"weight_map": placed})
    return total


@pytest.mark.slow
def test_a_model_passes_through_little_memory(tmp_path: Path) -> None:
    """Simulated devices are this host's memory: one parameter is in it, and one shard more."""
    total = hollow_model(tmp_path / "hollow")
    parameter = LAYERS * 1024 * 1024 * 2
    allowed = parameter + parameter // 8 + 16 * MB
    assert total > 5 * allowed
    grown = int(on_mesh("memory", tmp_path / "hollow"))
    print(f"{total / MB:.0f} MB of weights passed through {grown / MB:.0f} MB of memory")
    assert grown < allowed
