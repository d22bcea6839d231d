"""A policy on disk: model.json, tokenizer.json and checkpoints/ in one folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import read_json, write_json
from klong_jax.engine.engine import Engine, EngineConfig
from klong_jax.models.config import DecoderConfig
from klong_jax.models.decoder import Decoder, Params, build
from klong_jax.pipelines.config.acting import EngineSection
from klong_jax.pipelines.config.training import ModelSection
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.chat import Chat
from klong_jax.text.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from klong_jax.training.accumulate import TrainState, init_state
from klong_jax.training.checkpoint import Checkpoints
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer


@dataclass(frozen=True)
class Policy:
    """A decoder and the tokenizer it speaks through.

    Attributes:
        config: The decoder's numbers.
        graph: The decoder.
        params: Its parameters.
        tokenizer: The tokenizer.
    """

    config: DecoderConfig
    graph: nnx.GraphDef[Decoder]
    params: Params
    tokenizer: Tokenizer

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint of this policy must match."""
        return {"model": self.config.fingerprint, "tokenizer": self.tokenizer.content_hash}

    @property
    def parameters(self) -> int:
        """How many numbers are learnt."""
        return sum(int(leaf.size) for leaf in jax.tree.leaves(self.params))


def new_policy(section: ModelSection, tokenizer: Tokenizer, seed: int) -> Policy:
    """A randomly initialised policy."""
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=section.hidden_size,
        num_layers=section.num_layers,
        num_heads=section.num_heads,
        num_kv_heads=section.num_kv_heads,
        head_dim=section.head_dim,
        intermediate_size=section.intermediate_size,
        rope_theta=section.rope_theta,
        tie_embeddings=section.tie_embeddings,
    )
    graph, params = build(config, seed)
    return Policy(config, graph, params, tokenizer)


def describe_policy(folder: Path, policy: Policy) -> None:
    """Writes what is needed beside the checkpoints to read them again."""
    if not isinstance(policy.tokenizer, HuggingFaceTokenizer):
        raise UserError("tokenizer.path: training needs a tokenizer.json, not a .model file.")
    write_json(folder / "model.json", policy.config.to_json())
    policy.tokenizer.save(folder / "tokenizer.json")


def load_policy(folder: Path) -> Policy:
    """Reads the latest checkpoint of a policy's folder.

    Args:
        folder: Holds model.json, tokenizer.json and checkpoints/.

    Raises:
        UserError: The folder is no policy's, or the checkpoint belongs to another model.
    """
    if not (folder / "model.json").exists():
        raise UserError(
            f"{folder}: holds no policy (no model.json); give a folder that `klong sft` or "
            "`klong rl` wrote, such as runs/ID/sft."
        )
    fields: dict[str, Any] = read_json(folder / "model.json")
    try:
        config = DecoderConfig(**fields)
    except TypeError as error:
        raise UserError(
            f"{folder}/model.json: {error}; it was written by another version."
        ) from None
    graph, params = build(config, 0)
    policy = Policy(config, graph, params, load_tokenizer(folder / "tokenizer.json"))
    checkpoints = Checkpoints(folder / "checkpoints", policy.identity)
    trained = checkpoints.restore_params(params)
    checkpoints.close()
    return Policy(config, graph, trained, policy.tokenizer)


def make_engine(policy: Policy, section: EngineSection, context: ContextPolicy) -> Engine:
    """An engine for the policy's decoder, with its parameters loaded."""
    engine = Engine(
        policy.graph,
        policy.config,
        Chat(policy.tokenizer),
        EngineConfig(
            slots=section.slots,
            context_limit=context.limit,
            temperature=section.temperature,
            prefill_chunk=section.prefill_chunk,
            decode_steps=section.decode_steps,
        ),
    )
    engine.load(policy.params, version=0)
    return engine


def fresh_state(policy: Policy, optimizer: OptimizerConfig) -> TrainState:
    """The policy's parameters with an optimiser that has seen nothing.

    Parameters are copied: a training step reuses the buffers of its state.
    """
    return init_state(
        jax.tree.map(lambda leaf: leaf.copy(), policy.params), make_optimizer(optimizer)
    )
