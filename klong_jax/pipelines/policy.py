"""A policy on disk: model.json, tokenizer.json and checkpoints/ in one folder."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import read_json, write_json
from klong_jax.engine.engine import Engine, EngineConfig, Scope
from klong_jax.models.config import DecoderConfig, DTypes, LoraConfig
from klong_jax.models.decoder import Decoder, Params, abstract, build
from klong_jax.models.hf.files import copy_side_files
from klong_jax.models.lora import ADAPTERS, adapt, merge_adapters
from klong_jax.models.placed import placed
from klong_jax.parallel.distributed import is_first, together
from klong_jax.parallel.rules import param_shardings, spread
from klong_jax.pipelines.config.acting import EngineSection
from klong_jax.pipelines.config.training import LoraSection, ModelSection
from klong_jax.pipelines.dialect import load_dialect, save_dialect
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.text.chat import Chat
from klong_jax.text.dialect import Dialect
from klong_jax.text.template_chat import TemplateChat
from klong_jax.text.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from klong_jax.training.accumulate import TrainState, init_state
from klong_jax.training.checkpoint import Checkpoints
from klong_jax.training.frozen import Selection, joined
from klong_jax.training.optimizer import OptimizerConfig, make_optimizer

_ORIGIN = "huggingface"
_CHECKPOINTS = "checkpoints"
_ADAPTERS = "set of adapters"


@dataclass(frozen=True)
class Policy:
    """A decoder and the tokenizer it speaks through.

    Attributes:
        config: The decoder's numbers.
        graph: The decoder.
        params: Its parameters.
        tokenizer: The tokenizer.
        dtypes: The precisions of parameters and computation.
        origin: Folder with the config.json and the other small files of the Hugging Face model
            that it came from, if it did.
        learnt: The chat dialect that it was trained in; ChatML if not given.
        lora: The adapters in training, if graph and parameters have any.
    """

    config: DecoderConfig
    graph: nnx.GraphDef[Decoder]
    params: Params
    tokenizer: Tokenizer
    dtypes: DTypes
    origin: Path | None = None
    learnt: Dialect | None = None
    lora: LoraConfig | None = None

    @property
    def dialect(self) -> Dialect:
        """The chat dialect in which it can act.

        Raises:
            UserError: It was trained in one that is not for acting.
        """
        if isinstance(self.learnt, TemplateChat):
            self.learnt.check_acting()
        return self.learnt or Chat(self.tokenizer)

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint of this policy must match."""
        model = {"model": self.config.fingerprint, "tokenizer": self.tokenizer.content_hash}
        return {**model, _ADAPTERS: self.lora.name} if self.lora else model

    @property
    def parameters(self) -> int:
        """How many numbers are learnt."""
        return sum(int(leaf.size) for leaf in jax.tree.leaves(self.params))


def new_policy(
    section: ModelSection, tokenizer: Tokenizer, seed: int, mesh: Mesh | None = None
) -> Policy:
    """A randomly initialised policy.

    Args:
        section: The decoder's numbers.
        tokenizer: Gives the size of the vocabulary.
        seed: The parameters follow from it, whatever the mesh.
        mesh: Where its parameters go; one device if not given.

    Raises:
        UserError: The mesh does not divide a parameter.
    """
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
    dtypes = DTypes(params="float32", compute=section.compute)
    # Made whole, on each host: a compiled initialisation would round differently on each mesh.
    graph, params = build(config, seed, dtypes)
    if mesh is not None:
        params = jax.tree.map(spread, params, param_shardings(params, mesh))
    return Policy(config, graph, params, tokenizer, dtypes)


def describe_policy(folder: Path, policy: Policy) -> None:
    """Writes what is needed beside the checkpoints to read them again; one process does."""
    if not isinstance(policy.tokenizer, HuggingFaceTokenizer):
        raise UserError("tokenizer.path: training needs a tokenizer.json, not a .model file.")
    if not is_first():
        return
    described = {**policy.config.to_json(), "dtypes": asdict(policy.dtypes)}
    if policy.lora is not None:
        described["lora"] = policy.lora.to_json()
    write_json(folder / "model.json", described)
    policy.tokenizer.save(folder / "tokenizer.json")
    if policy.learnt is not None:
        save_dialect(folder, policy.learnt)
    if policy.origin is not None and policy.origin != folder / _ORIGIN:
        copy_side_files(policy.origin, folder / _ORIGIN, "config.json", "passed_on.json")


def load_policy(folder: Path, *, as_stored: bool = False, mesh: Mesh | None = None) -> Policy:
    """Reads a checkpoint of a policy's folder; adapters are merged into their matrices.

    Args:
        folder: Holds model.json, tokenizer.json and checkpoints/, of which the latest is taken;
            FOLDER/checkpoints/STEP takes that one.
        as_stored: Leave each parameter in the dtype it has on disk.
        mesh: Where its parameters go, whichever mesh wrote them; one device if not given.

    Raises:
        UserError: The folder is no policy's, or the checkpoint belongs to another model.
    """
    step = None
    if folder.parent.name == _CHECKPOINTS and folder.name.isdecimal():
        folder, step = folder.parent.parent, int(folder.name)
    together(lambda: _check(folder))
    fields: dict[str, Any] = read_json(folder / "model.json")
    try:
        dtypes = DTypes(**fields.pop("dtypes"))
        adapters = fields.pop("lora", None)
        lora = LoraConfig.from_json(adapters) if adapters else None
        config = DecoderConfig.from_json(fields)
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{folder}/model.json: {error}; it was written by another version."
        ) from None
    graph, shapes = placed(config, dtypes, mesh, lora)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    origin = folder / _ORIGIN
    policy = Policy(
        config,
        graph,
        shapes,
        tokenizer,
        dtypes,
        origin if origin.is_dir() else None,
        load_dialect(folder, tokenizer),
        lora,
    )
    checkpoints = Checkpoints(folder / _CHECKPOINTS, policy.identity)
    trained = checkpoints.restore_params(shapes, as_stored=as_stored, step=step)
    checkpoints.close()
    return merged(replace(policy, params=trained))


def _check(folder: Path) -> None:
    if not (folder / "model.json").exists():
        raise UserError(
            f"{folder}: holds no policy (no model.json); give a folder that `klong sft` or "
            "`klong rl` wrote, such as runs/ID/sft."
        )


def make_engine(
    policy: Policy, section: EngineSection, context: ContextPolicy, scope: Scope
) -> Engine:
    """An engine for the policy's decoder; it works in the scope."""
    return Engine(
        policy.graph,
        policy.config,
        policy.dialect,
        EngineConfig(
            slots=section.slots,
            context_limit=context.limit,
            temperature=section.temperature,
            prefill_chunk=section.prefill_chunk,
            decode_steps=section.decode_steps,
        ),
        policy.dtypes,
        scope,
    )


def adapted(policy: Policy, section: LoraSection, seed: int) -> Policy:
    """The policy with fresh adapters on the active mesh; itself where the rank is 0.

    Raises:
        UserError: The model has no matrix of a name.
    """
    lora = section.config()
    if lora is None:
        return policy
    graph, params = adapt(policy.graph, policy.params, lora, policy.dtypes, seed)
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        fresh, base = Selection(learnt=ADAPTERS).split(params)
        fresh = jax.tree.map(spread, fresh, param_shardings(fresh, mesh))
        params = joined(base, fresh)
    return replace(policy, graph=graph, params=params, lora=lora)


def merged(policy: Policy) -> Policy:
    """The policy with its adapters added to the matrices beside them, as it acts and is read."""
    if policy.lora is None:
        return policy
    graph, _ = abstract(policy.config, policy.dtypes)
    params = merge_adapters(policy.params, policy.lora)
    return replace(policy, graph=graph, params=params, lora=None)


def fresh_state(policy: Policy, optimizer: OptimizerConfig) -> TrainState:
    """The policy's parameters with an optimiser that has seen nothing.

    What is learnt is copied: a training step reuses its buffers.
    """
    learnt, frozen = optimizer.selection.split(policy.params)
    copied = jax.tree.map(lambda leaf: leaf.copy(), learnt)
    params = joined(copied, frozen)
    return init_state(params, make_optimizer(optimizer), optimizer.selection)
