"""The settings of every command: what Hydra composes from configs/ must become one of these.

The sentence under a field is its explanation in `klong COMMAND --help`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from klong_jax.core.errors import UserError
from klong_jax.rl.stages import Stage, check_stages
from klong_jax.splitting.policy import ContextPolicy

if TYPE_CHECKING:
    from klong_jax.training.optimizer import OptimizerConfig


class Section(BaseModel):
    """Settings that belong together; an unknown name or a wrong type is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class RunSection(Section):
    """Where a run lives."""

    root: Path
    """Folder that holds the runs."""
    id: str | None = Field(pattern=r"^[\w.-]+$")
    """Name of the run; null derives it from the settings, so that the same command resumes."""
    fresh: bool
    """Start anew beside an earlier run of the same settings instead of resuming it."""


class ClockSection(Section):
    """How active time is measured."""

    kind: Literal["virtual", "wall"]
    """virtual charges the prices below, so results repeat; wall charges what was measured."""
    token_s: float = Field(gt=0)
    """Virtual seconds of one generated token."""
    tool_s: float = Field(ge=0)
    """Virtual seconds of one tool call."""


class SandboxSection(Section):
    """Where tools run."""

    url: str | None
    """A running sandbox service; null starts one inside this process."""
    token_env: str | None
    """Environment variable that holds the service's bearer token."""
    backend: Literal["local", "docker"]
    """What the service started here makes sandboxes of."""
    isolation: Literal["auto", "bubblewrap", "none"]
    """Of the local backend; auto takes bubblewrap where it works."""
    cpus: float = Field(gt=0)
    """Processors a sandbox may use."""
    memory_mb: int = Field(gt=0)
    """Memory a sandbox may use, in MiB."""
    pids: int = Field(gt=0)
    """Processes a sandbox may hold."""


class QueueSection(Section):
    """The durable queue of rollouts."""

    url: str | None
    """redis://host:port/db, or an SQLite file; null is a file in the run's folder."""
    max_attempts: int = Field(ge=1)
    """Infrastructure failures after which a rollout is given up."""


class ModelSection(Section):
    """A Qwen3 decoder to be trained from scratch; the vocabulary is the tokenizer's."""

    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    num_layers: int = Field(gt=0)
    """Decoder blocks."""
    num_heads: int = Field(gt=0)
    """Query heads."""
    num_kv_heads: int = Field(gt=0)
    """Key and value heads; divides num_heads."""
    head_dim: int = Field(gt=0, multiple_of=2)
    """Width of a head; even."""
    intermediate_size: int = Field(gt=0)
    """Width of the MLP."""
    rope_theta: float = Field(gt=0)
    """Base of the rotary frequencies."""
    tie_embeddings: bool
    """Whether output and input embeddings are one."""

    @model_validator(mode="after")
    def _heads(self) -> "ModelSection":
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model: num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads}); change one of them."
            )
        return self


class SplittingSection(Section):
    """The context policy, in tokens."""

    context_limit: int
    """Longest context the model may see, its output included."""
    overlap: int
    """Most history carried over when a new window starts."""
    reserve: int
    """Room kept for the next output: what the agent may generate in one turn."""

    @model_validator(mode="after")
    def _fits(self) -> "SplittingSection":
        self.policy()
        return self

    def policy(self) -> ContextPolicy:
        """The policy with these numbers."""
        return ContextPolicy(self.context_limit, self.overlap, self.reserve)


class TokenizerTraining(Section):
    """The tokenizer that is trained on the demonstrations."""

    vocab_size: int = Field(gt=300)
    """Largest vocabulary."""


class AgentSection(Section):
    """The scaffold around the model."""

    max_turns: int = Field(gt=0)
    """Most assistant turns of a rollout."""
    tool_timeout_s: float = Field(gt=0)
    """Wall-clock seconds of one command."""
    judges: int = Field(gt=0)
    """Judgements that run at once."""


class EngineSection(Section):
    """The generation engine."""

    slots: int = Field(gt=0)
    """Rollouts served at once."""
    temperature: float = Field(ge=0)
    """Of sampling, in RL of the policy that is trained too; 0 takes the likeliest token."""
    prefill_chunk: int = Field(gt=0)
    """Prompt tokens taken up in one call."""
    decode_steps: int = Field(gt=0)
    """Tokens sampled in one call."""


class TasksSection(Section):
    """The generated tasks: their sizes in components, taken in turn."""

    demonstrated: int = Field(gt=0)
    """Tasks that the teacher demonstrates."""
    demonstrated_components: tuple[int, ...] = Field(min_length=1)
    """Their sizes."""
    long_components: tuple[int, ...]
    """Sizes of further demonstrations, one each, for trajectories of hundreds of turns."""
    practised: int = Field(gt=0)
    """Tasks that RL draws from."""
    practised_components: tuple[int, ...] = Field(min_length=1)
    """Their sizes."""
    heldout_components: tuple[int, ...] = Field(min_length=1)
    """Sizes of the tasks that only evaluation sees, one each."""


class TeacherSection(Section):
    """Who demonstrates."""

    url: str | None
    """Base URL of a chat-completions endpoint; null starts the scripted Replicate expert."""
    model: str
    """Name of the model at the endpoint."""
    key_env: str | None
    """Environment variable that holds the endpoint's key."""
    mistake_rate: float = Field(ge=0, le=1)
    """Of the scripted expert: share of components first built wrong and then mended."""
    inspect_rate: float = Field(ge=0, le=1)
    """Of the scripted expert: share of components read again before they are run."""


class DistillSection(Section):
    """Demonstrations by rejection sampling."""

    min_score: float = Field(ge=0, le=1)
    """Judged score below which a demonstration is rejected."""
    timeout_s: float = Field(gt=0)
    """Active seconds a demonstration may take."""
    concurrency: int = Field(gt=0)
    """Demonstrations at once."""
    context_limit: int = Field(gt=0)
    """The teacher's own context, in tokens of the bundled tokenizer."""


class OptimizerSection(Section):
    """How parameters are updated."""

    kind: Literal["muon", "adamw"]
    """muon orthogonalises the updates of matrices and leaves the rest to AdamW."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate; under muon that of the matrices."""
    warmup_steps: int = Field(ge=0)
    """Steps until the peak."""
    weight_decay: float = Field(ge=0)
    """Decoupled weight decay."""
    clip_norm: float = Field(gt=0)
    """Largest norm of the gradient."""

    def config(self, total_steps: int) -> "OptimizerConfig":
        """The optimiser's config; total_steps=0 keeps the rate constant after the warm-up."""
        # Imported on use: commands that train nothing start without JAX.
        from klong_jax.training.optimizer import OptimizerConfig

        return OptimizerConfig(
            kind=self.kind,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            total_steps=total_steps,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )


class DrillSection(Section):
    """Short generated conversations."""

    conversations: int = Field(ge=0)
    """How many are generated; 0 leaves the phase out."""
    steps: int = Field(ge=0)
    """Optimiser steps on them."""
    batch: int = Field(gt=0)
    """Conversations a step."""
    length: int = Field(gt=0)
    """Tokens a conversation is padded to; longer ones are left out."""


class SftSection(Section):
    """Supervised fine-tuning on windows."""

    steps: int = Field(gt=0)
    """Optimiser steps on the windows of trajectories."""
    batch: int = Field(gt=0)
    """Windows a step."""
    micro_batch: int = Field(gt=0)
    """Windows a gradient call."""
    remat: bool
    """Recompute activations in the backward pass: less memory, a third more work."""
    save_every: int = Field(gt=0)
    """Steps between checkpoints."""
    optimizer: OptimizerSection


class StageSection(Section):
    """One stage of progressive RL."""

    timeout_s: float = Field(gt=0)
    """Active seconds a rollout may take."""
    max_steps: int = Field(gt=0)
    """The stage ends after so many optimiser steps."""
    min_steps: int = Field(gt=0)
    """But not before so many."""
    advance_score: float = Field(gt=0, le=1)
    """Within them, the stage ends once a step's mean score reaches this."""


class RlSection(Section):
    """Progressive reinforcement learning."""

    groups: int = Field(gt=0)
    """Tasks a step."""
    rollouts: int = Field(ge=2)
    """Rollouts a task: the group that is compared."""
    tokens_per_rollout: int = Field(gt=0)
    """The loss's constant C: about how many tokens a rollout samples."""
    micro_batch: int = Field(gt=0)
    """Windows a gradient call."""
    remat: bool
    """Recompute activations in the backward pass: less memory, a third more work."""
    clip: float = Field(gt=0)
    """How far the probability ratio may move from 1."""
    importance_cap: float = Field(gt=0)
    """Largest weight for samples of a policy that differs from the trained one."""
    kl_beta: float = Field(ge=0)
    """Weight of the divergence from the policy RL starts from."""
    optimizer: OptimizerSection
    stages: tuple[StageSection, ...] = Field(min_length=1)
    """The stages, shortest timeout first."""

    @model_validator(mode="after")
    def _progressive(self) -> "RlSection":
        check_stages(self.timeline())
        return self

    def timeline(self) -> tuple[Stage, ...]:
        """The stages."""
        return tuple(
            Stage(stage.timeout_s, stage.max_steps, stage.advance_score, stage.min_steps)
            for stage in self.stages
        )


class EvalSection(Section):
    """Evaluation on held-out tasks."""

    rollouts: int = Field(gt=0)
    """Attempts a task."""
    timeout_s: float = Field(gt=0)
    """Active seconds an attempt may take."""
    extreme_s: float = Field(gt=0)
    """Active seconds from which an overflowing attempt counts as extremely long-horizon."""


class DataSection(Section):
    """Recorded trajectories."""

    path: Path
    """A file or folder of trajectories, in any format klong reads."""
    skip_bad: bool
    """Pass over records that cannot be read instead of stopping at the first."""


class TokenizerSection(Section):
    """How text becomes tokens."""

    path: Path | None
    """A tokenizer.json, a .model or a model's folder; null takes the small bundled one."""


def _needs_samples(engine: EngineSection) -> None:
    if engine.temperature == 0:
        raise UserError("engine.temperature=0: RL compares samples; set it above 0.")


class RecipeConfig(Section):
    """The whole recipe on generated tasks: demonstrations, SFT, progressive RL, report."""

    seed: int = Field(ge=0)
    """Everything random follows from it."""
    profile: Literal["smoke", "tiny"]
    """smoke trains a policy worth looking at in minutes; tiny only shows that every part runs."""
    run: RunSection
    clock: ClockSection
    sandbox: SandboxSection
    queue: QueueSection
    agent: AgentSection
    engine: EngineSection
    tasks: TasksSection
    teacher: TeacherSection
    distill: DistillSection
    tokenizer: TokenizerTraining
    model: ModelSection
    splitting: SplittingSection
    lookup_drills: DrillSection
    component_drills: DrillSection
    sft: SftSection
    rl: RlSection
    eval: EvalSection

    @model_validator(mode="after")
    def _on_policy(self) -> "RecipeConfig":
        _needs_samples(self.engine)
        return self


class FactoryConfig(Section):
    """Generates Replicate tasks in PaperBench's layout."""

    output: Path
    """Folder to write the task folders into."""
    count: int = Field(gt=0)
    """How many tasks."""
    components: tuple[int, ...] = Field(min_length=1)
    """Their sizes in components, 4 to 256, taken in turn."""
    seed: int = Field(ge=0)
    """Everything random follows from it."""


class DistillConfig(Section):
    """Demonstrations of tasks by a teacher in real sandboxes, kept if judged well."""

    tasks: Path
    """Folder of task folders."""
    output: Path
    """JSONL file to write the demonstrations into."""
    seed: int = Field(ge=0)
    """Everything random follows from it."""
    clock: ClockSection
    sandbox: SandboxSection
    agent: AgentSection
    teacher: TeacherSection
    splitting: SplittingSection
    distill: DistillSection


class SplitConfig(Section):
    """How recorded trajectories would be split into windows."""

    data: DataSection
    tokenizer: TokenizerSection
    splitting: SplittingSection
    output: Path | None
    """JSON file to write the plan into."""


class SftConfig(Section):
    """Supervised fine-tuning on recorded trajectories."""

    seed: int = Field(ge=0)
    """Everything random follows from it."""
    run: RunSection
    data: DataSection
    tokenizer: TokenizerSection
    model: ModelSection
    splitting: SplittingSection
    sft: SftSection


class RlConfig(Section):
    """Progressive RL from a policy that `klong sft` or an earlier RL wrote."""

    seed: int = Field(ge=0)
    """Everything random follows from it."""
    policy: Path
    """Folder of the policy to start from, such as runs/ID/sft."""
    tasks: Path
    """Folder of task folders."""
    run: RunSection
    clock: ClockSection
    sandbox: SandboxSection
    queue: QueueSection
    agent: AgentSection
    engine: EngineSection
    splitting: SplittingSection
    rl: RlSection

    @model_validator(mode="after")
    def _on_policy(self) -> "RlConfig":
        _needs_samples(self.engine)
        return self


class EvalConfig(Section):
    """Evaluation of a policy on tasks."""

    seed: int = Field(ge=0)
    """Everything random follows from it."""
    policy: Path
    """Folder of the policy, such as runs/ID/rl."""
    tasks: Path
    """Folder of task folders."""
    run: RunSection
    clock: ClockSection
    sandbox: SandboxSection
    queue: QueueSection
    agent: AgentSection
    engine: EngineSection
    splitting: SplittingSection
    eval: EvalSection


class RubricConfig(Section):
    """What a rubric asks for, and its score if it is graded."""

    path: Path
    """A rubric's JSON file, or a folder to search for them."""
    output: Path | None
    """JSON file to write the numbers into."""


class ReportConfig(Section):
    """The report of a run, drawn again."""

    path: Path
    """The run's folder, such as runs/ID."""


class SandboxConfig(Section):
    """The sandbox service."""

    backend: Literal["local", "docker"]
    """What sandboxes are made of."""
    isolation: Literal["auto", "bubblewrap", "none"]
    """Of the local backend; auto takes bubblewrap where it works."""
    host: str
    """Address to serve on; one that others can reach needs a token."""
    port: int = Field(ge=0, le=65535)
    """Port to serve on; 0 takes a free one."""
    token_env: str | None
    """Environment variable that holds the bearer token to ask for."""
    state_dir: Path | None
    """Where workspaces live; null is the temporary directory."""


class DoctorConfig(Section):
    """What this machine can do."""

    root: Path
    """Folder whose free space is measured."""
    image: str
    """Sandbox image that the docker backend takes."""
    redis: str
    """Redis server to look for."""


CONFIGS: dict[str, type[Section]] = {
    "recipe": RecipeConfig,
    "factory": FactoryConfig,
    "distill": DistillConfig,
    "split": SplitConfig,
    "sft": SftConfig,
    "rl": RlConfig,
    "eval": EvalConfig,
    "rubric": RubricConfig,
    "report": ReportConfig,
    "sandbox": SandboxConfig,
    "doctor": DoctorConfig,
}
"""The settings of each command; configs/COMMAND.yaml holds their defaults."""
