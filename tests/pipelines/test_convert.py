"""`klong convert` both ways, what it refuses, and what training makes of an imported policy."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

import klong_jax.text
from klong_jax.core.errors import UserError
from klong_jax.models.config import DTypes
from klong_jax.pipelines.compose import config_dir, validate
from klong_jax.pipelines.convert import run
from klong_jax.pipelines.outfolder import complete_folder
from klong_jax.pipelines.policy import describe_policy, load_policy, new_policy
from klong_jax.text.tokenizer import bundled_tokenizer, train_tokenizer
from klong_jax.training.accumulate import TrainState
from klong_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = Path(klong_jax.text.__file__).parent / "bundled" / "tokenizer.json"
LATER = "model.layers.2.eh_proj.weight"
SIDE_FILES = {
    "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
    "generation_config.json": '{"eos_token_id": [7], "transformers_version": "5.0.0"}',
    "chat_template.jinja": "{{ messages }}",
}


def settings(command: str, *overrides: str) -> Any:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return validate(command, compose(command, list(overrides)), overrides)


def convert(**given: object) -> None:
    run(settings("convert", *(f"{name}={value}" for name, value in given.items())))


def refusal(**given: object) -> str:
    with pytest.raises(UserError) as caught:
        convert(**given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small Qwen3 in bfloat16 as transformers saves it, with a tensor of a layer to come."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=6016,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        tie_word_embeddings=True,
    )
    folder = tmp_path / "source"
    transformers.Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="30KB")
    save_file({LATER: torch.randn(16, 32)}, folder / "later.safetensors")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][LATER] = "later.safetensors"
    index.write_text(json.dumps(values))
    shutil.copy(TOKENIZER, folder)
    for name, text in SIDE_FILES.items():
        (folder / name).write_text(text)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_to_a_policy_and_back_every_bit_is_the_same(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(source=source, output=tmp_path / "policy")
    assert f"1 tensor ({LATER})" in capsys.readouterr().out
    back = tmp_path / "back"
    convert(source=tmp_path / "policy", output=back, original=source, shard_gb=3e-5)
    assert_same(tensors(back), tensors(source))
    for name in ("tokenizer.json", *SIDE_FILES):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    config = "config.json"
    assert json.loads((back / config).read_text()) == json.loads((source / config).read_text())
    # Without the original, what the decoder does not know is left out, and that is said.
    capsys.readouterr()
    convert(source=tmp_path / "policy", output=tmp_path / "without")
    assert f"1 tensor ({LATER})" in capsys.readouterr().out
    known = {name: tensor for name, tensor in tensors(source).items() if name != LATER}
    assert_same(tensors(tmp_path / "without"), known)
    assert set(SIDE_FILES) < left(tmp_path / "without")
    assert left(tmp_path) == {"source", "policy", "back", "without"}


def test_a_policy_is_held_and_computed_in_what_is_asked_for(source: Path, tmp_path: Path) -> None:
    convert(source=source, output=tmp_path / "kept")
    convert(source=source, output=tmp_path / "cast", dtype="bfloat16", compute="float32")
    kept, cast = load_policy(tmp_path / "kept"), load_policy(tmp_path / "cast")
    assert kept.dtypes == DTypes("float32", "bfloat16")
    assert cast.dtypes == DTypes("bfloat16", "float32")
    stored = load_policy(tmp_path / "kept", as_stored=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept.params)} == {np.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(stored.params)} == {
        leaf.dtype for leaf in jax.tree.leaves(cast.params)
    }
    pairs = zip(jax.tree.leaves(kept.params), jax.tree.leaves(stored.params), strict=True)
    for wide, narrow in pairs:
        np.testing.assert_array_equal(wide, np.asarray(narrow, np.float32))


def test_a_policy_of_one_mesh_is_read_on_another(source: Path, tmp_path: Path) -> None:
    """Written by eight devices and read by one, and the other way round."""

    def on_eight_devices(*given: str) -> None:
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
        done = subprocess.run(
            [sys.executable, "-m", "klong_jax.cli", "convert", *given],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    on_eight_devices("source=source", "output=many", "mesh.fsdp=4", "mesh.tensor=2")
    convert(source=tmp_path / "many", output=tmp_path / "back", original=source)
    assert_same(tensors(tmp_path / "back"), tensors(source))
    convert(source=source, output=tmp_path / "one")
    on_eight_devices("source=one", "output=again", "original=source")
    assert_same(tensors(tmp_path / "again"), tensors(source))


def test_a_policy_trained_here_is_exported_with_its_tokenizer(tmp_path: Path) -> None:
    section = settings("sft", "data.path=x", "model.num_layers=1", "model.hidden_size=16").model
    policy = new_policy(section, train_tokenizer(["a b c"] * 9, 400), 0)
    describe_policy(tmp_path / "policy", policy)
    checkpoints = Checkpoints(tmp_path / "policy" / "checkpoints", policy.identity)
    checkpoints.save(TrainState(policy.params, (), np.int32(3)), {})
    checkpoints.close()
    convert(source=tmp_path / "policy", output=tmp_path / "model", dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "a b c<|im_end|>"
    assert tokenizer(text)["input_ids"] == policy.tokenizer.encode(text, specials=True)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]


@pytest.mark.slow
def test_sft_goes_on_from_an_imported_policy(source: Path, tmp_path: Path) -> None:
    convert(source=source, output=tmp_path / "policy")
    asked, answered = {"role": "user", "content": "Go."}, {"role": "assistant", "content": "Gone."}
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": [asked, answered]}) + "\n")
    given = (
        "data.path=data.jsonl policy=policy run.id=run sft.steps=2 sft.batch=1 sft.save_every=1 "
        "sft.optimizer.kind=adamw sft.optimizer.learning_rate=1e-3 sft.optimizer.warmup_steps=0 "
        "splitting={context_limit:64,overlap:8,reserve:8}"
    )
    trained = subprocess.run(
        [sys.executable, "-m", "klong_jax.cli", "sft", *given.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert trained.returncode == 0, trained.stderr
    convert(source=tmp_path / "runs/run/sft", output=tmp_path / "model", original=source)
    got, was = tensors(tmp_path / "model"), tensors(source)
    assert torch.equal(got[LATER], was[LATER])
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (got[name].float() - was[name].float()).abs().max().item()
    assert 0 < moved < 0.02
    assert set(SIDE_FILES) < left(tmp_path / "model")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("contradiction", ["model.num_layers=3", "tokenizer.path=t.json"])
def test_a_policy_and_another_model_contradict_each_other(contradiction: str) -> None:
    settings("sft", "data.path=x", "policy=p")
    with pytest.raises(UserError, match=f"policy=p: .* {contradiction.split('=')[0]} contradicts"):
        settings("sft", "data.path=x", "policy=p", contradiction)


def test_what_is_there_is_replaced_only_when_told(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "policy"
    convert(source=source, output=output)
    assert "is there already" in refusal(source=source, output=output)
    (output / "old").write_text("")
    convert(source=source, output=output, overwrite=True)
    assert left(output) == {"model.json", "tokenizer.json", "checkpoints", "huggingface"}
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    assert "something else" in refusal(source=source, output=other, overwrite=True)
    said = refusal(source=source, output=source, overwrite=True)
    assert f"would replace {source}" in said
    assert "would replace" in refusal(source=source, output=tmp_path, overwrite=True)
    (tmp_path / "file").write_text("")
    assert "is there already" in refusal(source=source, output=tmp_path / "file")
    assert "cannot be written" in refusal(source=source, output=tmp_path / "file" / "sub")
    assert left(tmp_path) == {"source", "policy", "other", "file"}


def test_what_fails_leaves_nothing_and_takes_nothing_away(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "policy"
    convert(source=source, output=output)
    before = (output / "model.json").read_text()
    with (source / "later.safetensors").open("r+b") as file:
        file.truncate(200)
    for given in ({"output": output, "overwrite": True}, {"output": tmp_path / "new"}):
        assert "later.safetensors: is cut short" in refusal(source=source, **given)
    assert left(tmp_path) == {"source", "policy"}
    assert (output / "model.json").read_text() == before


def test_a_folder_is_not_there_before_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with (
        pytest.raises(KeyboardInterrupt),
        complete_folder(output, overwrite=False) as folder,
    ):
        (folder / "model.json").write_text("{}")
        assert not output.exists()
        raise KeyboardInterrupt
    assert left(tmp_path) == set()
    with complete_folder(output, overwrite=False) as folder:
        (folder / "model.json").write_text("{}")
    assert left(output) == {"model.json"}


def test_what_cannot_be_converted_is_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert "is neither a policy" in refusal(source=tmp_path, output=output)
    assert "leave it out" in refusal(source=source, output=output, original=source)
    (source / "tokenizer.json").unlink()
    assert "tokenizer.json: no such tokenizer" in refusal(source=source, output=output)
    train_tokenizer(["a"], 300).save(source / "tokenizer.json")
    small = {**json.loads((source / "config.json").read_text()), "vocab_size": 17}
    (source / "config.json").write_text(json.dumps(small))
    assert "model.embed_tokens.weight has shape" in refusal(source=source, output=output)
    assert left(tmp_path) == {"source"}


def test_a_tokenizer_larger_than_the_embedding_is_refused(source: Path, tmp_path: Path) -> None:
    words = {f"word{n}": n for n in range(6017)}
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer.update(added_tokens=[], model={"type": "WordLevel", "vocab": words, "unk_token": "?"})
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = refusal(source=source, output=tmp_path / "output")
    assert "has 6017 tokens, but the model embeds 6016" in said
    assert bundled_tokenizer().vocab_size <= 6016


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    source: Path, tmp_path: Path, small_disk: Path
) -> None:
    (source / "tokenizer.json").unlink()
    train_tokenizer(["a"], 300).save(source / "tokenizer.json")
    said = refusal(source=source, output=small_disk / "policy")
    assert "No space left" in said
    assert left(small_disk) == set()
    convert(source=source, output=tmp_path / "policy")
    said = refusal(source=tmp_path / "policy", output=small_disk / "model", dtype="float32")
    assert "No space left on device" in said
    assert "cannot be written" in said
    assert left(small_disk) == set()
