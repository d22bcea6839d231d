"""`klong convert`: from a Hugging Face directory to a policy, and back."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import read_json, write_json
from klong_jax.models.config import DType, DTypes
from klong_jax.models.decoder import abstract
from klong_jax.models.families import family_of
from klong_jax.models.hf.directory import EMBEDDING, HfModel, open_model
from klong_jax.models.hf.files import copy_side_files
from klong_jax.models.hf.reader import read_params
from klong_jax.models.hf.writer import plan_tensors, write_model
from klong_jax.pipelines.config.commands import ConvertConfig
from klong_jax.pipelines.outfolder import complete_folder
from klong_jax.pipelines.policy import Policy, describe_policy, load_policy
from klong_jax.pipelines.process import device_mesh
from klong_jax.pipelines.stage import stage
from klong_jax.text.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from klong_jax.training.accumulate import TrainState
from klong_jax.training.checkpoint import Checkpoints

_PASSED_ON = "passed_on.json"
_END = "<|im_end|>"


def run(config: ConvertConfig) -> None:
    """Converts whichever way the source asks for."""
    console = Console()
    if (config.source / "model.json").exists():
        _export(config, console)
    elif (config.source / "config.json").exists():
        _import(config, console)
    else:
        raise UserError(
            f"source={config.source}: is neither a policy (no model.json) nor a Hugging Face "
            "directory (no config.json); check the path."
        )


def _import(config: ConvertConfig, console: Console) -> None:
    """Makes a policy that `klong sft`, `klong rl` and `klong eval` take."""
    if config.original is not None:
        raise UserError(
            f"original={config.original}: is for exports, and source={config.source} is a Hugging "
            "Face directory; leave it out."
        )
    with complete_folder(config.output, config.source, overwrite=config.overwrite) as folder:
        model = open_model(config.source)
        tokenizer = load_tokenizer(config.source / "tokenizer.json")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{config.source}/tokenizer.json: has {tokenizer.vocab_size} tokens, but the model "
                f"embeds {model.config.vocab_size}; one of them belongs to another model."
            )
        # Kept weights are stored as they are; a policy to be trained holds them in float32.
        dtypes = DTypes(config.dtype or "float32", config.compute or _stored_as(model))
        graph, _ = abstract(model.config, dtypes)
        names = [name for one in model.maps for _, name in one.tensors()]
        with stage(console, "reading", len(names)) as advance:
            params = read_params(
                model,
                mesh=device_mesh(config.mesh),
                dtypes=dtypes if config.dtype else None,
                on_tensor=lambda name: advance(1, name),
            )
            advance(0, f"{len(names)} tensors")
        policy = Policy(model.config, graph, params, tokenizer, dtypes, origin=config.source)
        _write_policy(folder, policy, model)
    console.print(f"{policy.parameters:,} parameters; policy in {config.output}", markup=False)
    if model.passed_on:
        console.print(
            f"{_some(model.passed_on)} are not the decoder's: an export with "
            f"original={config.source} carries them over.",
            markup=False,
        )


def _write_policy(folder: Path, policy: Policy, model: HfModel) -> None:
    describe_policy(folder, policy)
    write_json(folder / "huggingface" / _PASSED_ON, model.passed_on)
    # Closed also if a save fails: what still writes in the background would make the folder again
    # after it was removed.
    with closing(Checkpoints(folder / "checkpoints", policy.identity)) as checkpoints:
        state = TrainState(policy.params, (), jnp.int32(0))
        checkpoints.save(state, {"source": str(model.folder)})


def _stored_as(model: HfModel) -> DType:
    """The dtype that the model was meant to be run in."""
    return "bfloat16" if model.tensors[EMBEDDING].kind in ("BF16", "F16") else "float32"


def _export(config: ConvertConfig, console: Console) -> None:
    """Writes a directory that transformers loads."""
    inputs = [config.source, *([config.original] if config.original else [])]
    with complete_folder(config.output, *inputs, overwrite=config.overwrite) as folder:
        original = open_model(config.original) if config.original else None
        policy = load_policy(config.source, as_stored=True, mesh=device_mesh(config.mesh))
        tensors = plan_tensors(policy.config, policy.params, original, config.dtype)
        source = config.original or policy.origin
        if source is not None:
            hf_config = read_json(source / "config.json")
            copy_side_files(source, folder)
        else:
            hf_config = family_of(policy.config).config_to_hf(policy.config)
            _describe_tokenizer(folder, policy.tokenizer)
        with stage(console, "writing", len(tensors)) as advance:
            write_model(
                folder,
                hf_config,
                tensors,
                shard_bytes=int(config.shard_gb * 1e9),
                on_tensor=lambda tensor: advance(1, tensor.name),
            )
            advance(0, f"{len(tensors)} tensors")
    console.print(f"model in {config.output}", markup=False)
    if original is None and policy.origin is not None:
        passed_on = read_json(policy.origin / _PASSED_ON)
        if passed_on:
            console.print(
                f"{_some(passed_on)} of the model that the policy came from are left out: "
                "original=HF_DIR carries them over.",
                markup=False,
            )


def _describe_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """What transformers needs beside a tokenizer that was trained here."""
    assert isinstance(tokenizer, HuggingFaceTokenizer)  # the only kind a policy is saved with
    tokenizer.save(folder / "tokenizer.json")
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END},
    )
    write_json(
        folder / "generation_config.json", {"eos_token_id": tokenizer.encode(_END, specials=True)}
    )


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} tensors ({names[0]}, ...)" if len(names) > 1 else f"1 tensor ({names[0]})"
