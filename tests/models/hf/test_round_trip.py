"""From transformers' directories to the decoder and back, bit for bit, in every family."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from hf_models import CONFIGS, INDEX, MTP, add_shard, make, same, shards, tensors

from klong_jax.core.errors import UserError
from klong_jax.models.config import DType, DTypes
from klong_jax.models.decoder import Params, abstract
from klong_jax.models.families import FAMILIES
from klong_jax.models.hf.directory import HfModel, open_model
from klong_jax.models.hf.reader import read_params
from klong_jax.models.hf.writer import plan_tensors, write_model

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 17))


def export(
    model: HfModel,
    params: Params,
    folder: Path,
    *,
    original: HfModel | None = None,
    dtype: DType | None = None,
    shard_bytes: int = 60_000,
) -> Path:
    folder.mkdir()
    planned = plan_tensors(model.config, params, original, dtype)
    write_model(
        folder, model.hf_config, planned, shard_bytes=shard_bytes, on_tensor=lambda tensor: None
    )
    return folder


def test_every_family_is_here() -> None:
    assert {kind.split()[0] for kind in CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.bfloat16) for kind in CONFIGS),
        ("glm4_moe", torch.float32),
        ("glm4_moe", torch.float16),
    ],
)
def test_every_bit_comes_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = make(kind, tmp_path / "source", dtype=dtype)
    model = open_model(source)
    back = export(model, read_params(model), tmp_path / "back", original=model)
    want, got = tensors(source), tensors(back)
    assert want.keys() == got.keys()
    assert [name for name in want if not same(want[name], got[name])] == []
    if kind == "glm4_moe":
        assert f"model.layers.{MTP}.codes" in got
    # As transformers sees it: every tensor in its place, in the dtype that config.json says.
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        back, dtype="auto", output_loading_info=True
    )
    assert loaded.dtype == dtype
    assert not info["missing_keys"]
    ours = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()
    assert [n for n, value in loaded.state_dict().items() if not same(value, ours[n])] == []


@pytest.mark.parametrize("kind", ["llama", "glm4_moe"])
def test_what_is_read_computes_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    source = make(kind, tmp_path / "source", dtype=torch.float32)
    model = open_model(source)
    decoder = nnx.merge(abstract(model.config)[0], read_params(model))
    logits = decoder.apply(jnp.asarray(TOKENS)) @ decoder.output_embedding.T
    reference = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-5 * max(1.0, np.abs(expected).max()))


def test_files_are_cut_at_a_size_and_indexed(tmp_path: Path) -> None:
    model = open_model(make("qwen3", tmp_path / "source"))
    params = read_params(model)
    many = export(model, params, tmp_path / "many", shard_bytes=40_000)
    files = sorted(many.glob("*.safetensors"))
    assert len(files) > 2
    assert set(shards(many).values()) == {file.name for file in files}
    assert all(file.stat().st_size < 45_000 for file in files)
    assert shards(many).keys() == tensors(many).keys()
    one = export(model, params, tmp_path / "one", shard_bytes=10**9)
    assert [file.name for file in one.glob("*.safetensors")] == ["model.safetensors"]
    assert not (one / INDEX).exists()
    # A single file is read as well as a sharded one.
    again = read_params(open_model(one))
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(got, want)


def test_weights_are_cast_where_that_is_asked(tmp_path: Path) -> None:
    model = open_model(make("glm4_moe", tmp_path / "source"))
    kept, cast = read_params(model), read_params(model, dtypes=DTypes(params="float32"))
    assert kept["embedding"][...].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {jnp.dtype("float32")}
    for got, want in zip(jax.tree.leaves(cast), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(got, want.astype(jnp.float32))
    back = export(model, cast, tmp_path / "back", dtype="bfloat16")
    held = tensors(back)
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    assert f"model.layers.{MTP}.codes" not in held
    # The original's dtypes, tensor by tensor.
    again = tensors(export(model, cast, tmp_path / "again", original=model))
    assert all(same(again[name], value) for name, value in tensors(model.folder).items())


def test_a_directory_of_another_model_is_no_original(tmp_path: Path) -> None:
    model = open_model(make("qwen3", tmp_path / "a"))
    other = open_model(make("qwen3", tmp_path / "b", rms_norm_eps=1e-5))
    with pytest.raises(UserError, match=r"b/config\.json: describes another decoder .*norm_eps"):
        plan_tensors(model.config, read_params(model), other, None)


def test_shared_embeddings_that_are_written_twice_are_read_once(tmp_path: Path) -> None:
    source = make("qwen3 tied", tmp_path / "source")
    embedding = tensors(source)["model.embed_tokens.weight"]
    add_shard(source, {"lm_head.weight": embedding.clone()})
    model = open_model(source)
    back = export(model, read_params(model), tmp_path / "back", original=model)
    assert tensors(back).keys() == tensors(source).keys() - {"lm_head.weight"}
