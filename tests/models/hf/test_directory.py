"""What is wrong with a directory is said in one sentence that names the tensor and the file."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import INDEX, add_shard, edit, make, shards, tensors
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.models.hf.directory import open_model
from klong_jax.models.hf.files import copy_side_files
from klong_jax.models.hf.reader import read_params
from klong_jax.models.hf.tensorfile import read_header, write_tensors
from klong_jax.models.hf.writer import plan_tensors, write_model

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make("qwen3", tmp_path / "model")


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_params(open_model(folder))
    said = str(caught.value)
    assert "\n" not in said
    assert len(re.findall(r"\.(?= [A-Z]|$)", said)) == 1, said
    return said


def replace(folder: Path, name: str, tensor: torch.Tensor) -> None:
    add_shard(folder, {name: tensor})


def test_a_missing_file_is_named_with_a_tensor_of_it(folder: Path) -> None:
    file = shards(folder)[UP]
    (folder / file).unlink()
    said = refusal(folder)
    assert f"{folder / file}: no such file" in said
    assert next(name for name, where in shards(folder).items() if where == file) in said


def test_a_tensor_that_is_not_where_the_index_says(folder: Path) -> None:
    other = next(file for file in shards(folder).values() if file != shards(folder)[UP])
    edit(folder / INDEX, weight_map={**shards(folder), UP: other})
    assert f"{folder / other}: lacks {UP}" in refusal(folder)


def test_a_tensor_that_is_nowhere(folder: Path) -> None:
    rest = {name: file for name, file in shards(folder).items() if name != UP}
    edit(folder / INDEX, weight_map=rest)
    assert f"no file holds {UP}" in refusal(folder)


def test_a_wrong_shape(folder: Path) -> None:
    replace(folder, UP, torch.zeros(80, 47, dtype=torch.bfloat16))
    said = refusal(folder)
    assert f"more.safetensors: {UP} has shape (80, 47), but" in said
    assert "asks for (80, 48)" in said


def test_quantised_weights(folder: Path) -> None:
    replace(folder, UP, torch.zeros(80, 48, dtype=torch.int8))
    assert f"more.safetensors: {UP} is stored as I8" in refusal(folder)


def test_double_precision_is_not_silently_halved(folder: Path) -> None:
    replace(folder, UP, torch.zeros(80, 48, dtype=torch.float64))
    assert f"more.safetensors: {UP} is stored as F64" in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "mamba"}, "config.json: model_type is 'mamba'"),
        ({"model_type": None}, "config.json: model_type is None"),
        ({"hidden_size": None}, "config.json: field 'hidden_size' is missing"),
        ({"rms_norm_eps": None}, "config.json: field 'rms_norm_eps' is missing"),
    ],
)
def test_a_config_that_cannot_be_used(folder: Path, fields: dict[str, Any], said: str) -> None:
    edit(folder / "config.json", **fields)
    assert f"{folder}/{said}" in refusal(folder)


def test_no_config_and_no_weights(folder: Path) -> None:
    (folder / INDEX).write_text("[]")
    assert f"{INDEX}: has no weight_map" in refusal(folder)
    (folder / INDEX).unlink()
    assert "holds neither model.safetensors nor" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "config.json: holds no JSON object" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_file_that_is_cut_short(folder: Path, kept: int) -> None:
    file = folder / shards(folder)[UP]
    last = max(read_header(file).values(), key=lambda tensor: tensor.offset)
    os.truncate(file, kept if kept >= 0 else file.stat().st_size - 1)
    said = refusal(folder)
    assert f"{file}: is cut short" in said
    assert kept >= 0 or f"{last.name} ends at byte" in said


def test_a_header_that_lies(folder: Path) -> None:
    file = folder / shards(folder)[UP]
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"BF16"', b'"F32" ', 1))
    assert f"{file}: its safetensors header is garbled" in refusal(folder)


@given(data=st.binary(max_size=200), size=st.none() | st.integers(0, 300))
def test_no_bytes_are_anything_but_a_header_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int | None
) -> None:
    file = tmp_path_factory.getbasetemp() / "random.safetensors"
    file.write_bytes(data if size is None else size.to_bytes(8, "little") + data)
    try:
        read_header(file)
    except UserError as error:
        assert str(file) in str(error)


def test_embeddings_said_to_be_untied_and_not_there(tmp_path: Path) -> None:
    folder = make("qwen3 tied", tmp_path / "model")
    edit(folder / "config.json", tie_word_embeddings=False)
    said = refusal(folder)
    assert f"{folder}/config.json: tie_word_embeddings is false, but no file holds" in said
    assert "lm_head.weight" in said


def test_embeddings_said_to_be_tied_that_differ(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    said = refusal(folder)
    assert f"{folder / shards(folder)['lm_head.weight']}: lm_head.weight differs from" in said


def test_a_tensor_that_the_decoder_would_have_to_ignore(folder: Path) -> None:
    add_shard(folder, {"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)})
    assert "more.safetensors: the decoder has no place for model.layers.1.self" in refusal(folder)


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(folder: Path) -> None:
    add_shard(folder, {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert open_model(folder).passed_on == ()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(folder: Path, small_disk: Path) -> None:
    model = open_model(folder)
    planned = plan_tensors(model.config, read_params(model), None, None)
    written: list[str] = []
    with pytest.raises(UserError) as caught:
        write_model(
            small_disk,
            model.hf_config,
            planned,
            shard_bytes=20_000,
            on_tensor=lambda tensor: written.append(tensor.name),
        )
    said = str(caught.value)
    assert "No space left on device" in said
    failed = re.search(r"(\S+\.safetensors): (\S+) cannot be written", said)
    assert failed
    assert failed[2] not in written
    assert Path(failed[1]).parent == small_disk
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be copied to .*No space left"):
        copy_side_files(folder, small_disk)


def test_the_library_reads_what_is_written(tmp_path: Path, folder: Path) -> None:
    add_shard(folder, {"empty": torch.zeros(0, 3), "odd": torch.ones(3, dtype=torch.uint8)})
    entries = [
        entry for file in folder.glob("*.safetensors") for entry in read_header(file).values()
    ]
    write_tensors(tmp_path / "all.safetensors", entries, lambda tensor: None)
    got, want = tensors(tmp_path), tensors(folder)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    header = json.loads((tmp_path / "all.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert header["__metadata__"] == {"format": "pt"}
