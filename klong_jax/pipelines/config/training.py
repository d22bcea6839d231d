"""Settings of what learns: model, windows, optimiser, SFT and the stages of RL."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from klong_jax.core.errors import UserError
from klong_jax.models.config import LoraConfig, Remat, Target
from klong_jax.pipelines.config.section import Section
from klong_jax.rl.stages import Stage, check_stages
from klong_jax.splitting.pinning import Pin
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.splitting.recorded import Mode, Oversize, SplitOptions

if TYPE_CHECKING:
    from klong_jax.training.optimizer import OptimizerConfig


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
    compute: Literal["float32", "bfloat16"]
    """What parameters, held in float32, are cast to where they are used."""

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
    overlap_turns: int | None
    """Most turns carried over instead, as far as they fit; null bounds the tokens."""
    fade: tuple[Annotated[int, Field(ge=32)], ...]
    """Most environment tokens that a turn carried over still shows, by age: newest first, the last
    number for all older ones, as in [1024,256,64], a mark in the middle included; [] shows turns
    whole."""
    reserve: int
    """Room kept for the next output: what the agent may generate in one turn."""

    @model_validator(mode="after")
    def _fits(self) -> "SplittingSection":
        self.policy()
        return self

    def policy(self) -> ContextPolicy:
        """The policy with these numbers."""
        return ContextPolicy(
            self.context_limit, self.overlap, self.reserve, self.overlap_turns, self.fade
        )


class RecordingSplittingSection(SplittingSection):
    """The context policy, in tokens, and what is left open when a recording is split by it."""

    pin: str
    """What every window keeps: opening (all before the first answer), reading (that and the turns
    that only read), turns:N or tokens:N; what the data marks as pinned wins."""
    mode: Mode
    """klong, or what it is compared with: sliding_no_pin (windows without a pinned prefix) or
    truncate_tail (the first window alone; the rest is dropped)."""
    oversize: Oversize
    """A turn longer than a window: cut the middle out of its environment text, or refuse it; what
    the assistant said is never cut."""

    @model_validator(mode="after")
    def _known(self) -> "RecordingSplittingSection":
        self.options()
        return self

    def options(self) -> SplitOptions:
        """The options of splitting recordings."""
        return SplitOptions(Pin.parse(self.pin), self.mode, self.oversize)


class TokenizerTraining(Section):
    """The tokenizer that is trained on the demonstrations."""

    vocab_size: int = Field(gt=300)
    """Largest vocabulary."""


class TokenizerSection(Section):
    """How text becomes tokens."""

    path: Path | None
    """A tokenizer.json, a .model or a model's folder; null takes the small bundled one."""
    template: Literal["chatml", "own"]
    """How a conversation is written: chatml as Qwen3 without thinking, own as the chat template
    says that is in the model's folder."""
    thinking: Literal["keep", "strip"]
    """Under template=own, whether later turns see the thinking of earlier ones as it was said, or
    what the template leaves of it, in a new window wherever that breaks the extension of tokens."""


class DataSection(Section):
    """Recorded trajectories."""

    path: Path
    """A file or folder of trajectories, in any format klong reads."""
    skip_bad: bool
    """Pass over records that cannot be read instead of stopping at the first."""


class MixedSection(Section):
    """Recordings that are mixed in."""

    path: Path
    """A file or folder of recordings."""
    weight: float | None = None
    """How often it is drawn, where data.path is drawn once."""
    epochs: float | None = None
    """Instead, how often each of its groups of windows is drawn in all."""


class TokenisedDataSection(DataSection):
    """Recorded trajectories that are tokenised once and kept on disk."""

    mix: tuple[MixedSection, ...]
    """Recordings mixed in with those of data.path, each with a weight beside its 1 or with epochs,
    as in [{path:chat.jsonl,weight:0.5},{path:code.jsonl,epochs:2}]."""

    heldout: Path | None
    """A file or folder of recordings that are not trained on: their loss is taken at each
    checkpoint, in all and by position in the trajectory, and chooses what sft.keep_best keeps."""
    cache: Path | None
    """Folder of tokenised corpora, found again by what they depend on; null is corpora in the
    folder of runs."""
    workers: int = Field(ge=0)
    """Processes that tokenise; 0 is as many as the file is worth and the machine has cores."""


class OptimizerSection(Section):
    """How parameters are updated."""

    kind: Literal["muon", "adamw"]
    """muon orthogonalises the updates of matrices and leaves the rest to AdamW."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate; under muon that of the matrices."""
    warmup_steps: int = Field(ge=0)
    """Steps until the peak."""
    schedule: Literal["cosine", "constant", "linear", "wsd"]
    """After it: cosine and linear fall to a tenth of the peak, wsd stays and falls at the end,
    constant stays."""
    decay_share: float = Field(gt=0, le=1)
    """The share of all steps over which wsd falls."""
    weight_decay: float = Field(ge=0)
    """Decoupled weight decay."""
    clip_norm: float = Field(gt=0)
    """Largest norm of the gradient."""
    frozen: tuple[str, ...]
    """Parameters that are not trained, by name, such as embedding or blocks.*.scale."""
    ema_decay: float = Field(ge=0, lt=1)
    """What a moving average of the parameters keeps of itself at each step; it is then what the
    trained policy acts with. 0 makes none."""
    offload: bool
    """Hold the optimiser's state in the host's memory; the device sees it a layer at a time."""

    def config(self, total_steps: int, lora: "LoraSection") -> "OptimizerConfig":
        """The optimiser's config; total_steps=0 keeps the rate constant after the warm-up."""
        # Imported on use: commands that train nothing start without JAX.
        from klong_jax.models.lora import ADAPTERS
        from klong_jax.training.optimizer import OptimizerConfig

        return OptimizerConfig(
            kind=self.kind,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            total_steps=total_steps,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            schedule=self.schedule,
            decay_share=self.decay_share,
            frozen=self.frozen,
            learnt=ADAPTERS if lora.rank else ("*",),
            ema_decay=self.ema_decay,
            offload=self.offload,
        )


class LoraSection(Section):
    """Low-rank adapters that are trained in the place of the parameters (Hu et al. 2021)."""

    rank: int = Field(ge=0)
    """Rank of the adapters; 0 trains the parameters themselves."""
    alpha: float = Field(gt=0)
    """What adapters give is multiplied by alpha / rank."""
    targets: tuple[Target, ...] = Field(min_length=1)
    """Matrices that are adapted: query, key, value, output; gate, up and down of MLPs and shared
    experts. Routed experts are not."""

    def config(self) -> LoraConfig | None:
        """The adapters; None without any."""
        return LoraConfig(self.rank, self.alpha, self.targets) if self.rank else None


def check_lora(
    section: str, lora: LoraSection, optimizer: OptimizerSection, bias_rate: float
) -> None:
    """Refuses what adapters cannot be trained with.

    Raises:
        UserError: Names the settings.
    """
    if lora.rank and optimizer.kind == "muon":
        raise UserError(
            f"{section}.lora.rank={lora.rank}: adapters are trained with adamw; set "
            f"{section}.optimizer.kind=adamw and its learning_rate, such as 2e-4."
        )
    if lora.rank and bias_rate:
        raise UserError(
            f"{section}.router_bias_rate={bias_rate}: moves what {section}.lora.rank={lora.rank} "
            "leaves as it is; set one of the two to 0."
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
    """Groups of windows a step."""
    together: int = Field(gt=0)
    """Most windows of one trajectory that make a group; 1 shuffles windows one by one."""
    shared_prefix: int | Literal["auto"] = Field(union_mode="left_to_right")
    """Tokens at the front of a group's windows that are computed once for all of them, where the
    pinned prefix is as long; auto spares the most computation, with up to three lengths, 0 computes
    every window whole. The gradient is the same."""
    pack: bool
    """Whether short windows share a row of splitting.context_limit tokens, one behind another, so
    that little padding is computed: where a quarter of all fill at most half a row, and but for
    those that share a prefix. The gradient is the same."""
    micro_batch: int = Field(gt=0)
    """Rows of windows, or groups that share a prefix, a gradient call; rounded up to what the
    mesh's data, fsdp and expert share evenly."""
    remat: Remat | Literal["auto"]
    """What a layer keeps for its backward pass: none recomputes nothing, full everything but the
    layer's input; attention keeps what attention gave, dots the results of matrix products. auto
    takes what recomputes least and fits into the devices' memory."""
    scan_layers: bool
    """Whether layers are one compiled loop. One by one they take longer to compile, and on a GPU a
    step takes about 3% less time."""
    router_bias_rate: float = Field(ge=0)
    """What a step moves the routers' biases by to even out the load of experts; 0 leaves them."""
    save_every: int = Field(gt=0)
    """Steps between checkpoints."""
    keep_last: int = Field(gt=0)
    """How many of the latest checkpoints are kept; training resumes from the last."""
    keep_best: int = Field(ge=0)
    """How many are kept beside them of those saved at the lowest loss;
    policy=FOLDER/checkpoints/STEP takes one."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...]
    """Where metrics are shown beside metrics.jsonl; each needs the extra of its name."""
    optimizer: OptimizerSection
    lora: LoraSection

    @model_validator(mode="after")
    def _adapts(self) -> "SftSection":
        check_lora("sft", self.lora, self.optimizer, self.router_bias_rate)
        return self

    @model_validator(mode="after")
    def _shares(self) -> "SftSection":
        if self.shared_prefix not in (0, "auto") and self.together == 1:
            raise UserError(
                f"sft.shared_prefix={self.shared_prefix}: groups of one window share nothing; set "
                "sft.together above 1 or sft.shared_prefix=0."
            )
        return self

    @model_validator(mode="after")
    def _warms_up(self) -> "SftSection":
        optimizer = self.optimizer
        if optimizer.schedule == "wsd":
            stays = self.steps - round(optimizer.decay_share * self.steps)
            if optimizer.warmup_steps > stays:
                raise UserError(
                    f"sft.optimizer.decay_share={optimizer.decay_share}: leaves {stays} of "
                    f"sft.steps={self.steps} for the {optimizer.warmup_steps} warm-up steps; make "
                    "it smaller."
                )
        if optimizer.warmup_steps >= self.steps:
            raise UserError(
                f"sft.optimizer.warmup_steps={optimizer.warmup_steps}: leaves nothing of "
                f"sft.steps={self.steps}; make it smaller."
            )
        return self


def check_shared(section: str, shared: int | str, context_limit: int) -> None:
    """Refuses a shared prefix that leaves no room in a window.

    Raises:
        UserError: Names the setting and the limit.
    """
    if isinstance(shared, int) and not 0 <= shared < context_limit:
        raise UserError(
            f"{section}.shared_prefix={shared}: must be at least 0 and below "
            f"splitting.context_limit={context_limit}."
        )


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
    shared_prefix: int = Field(ge=0)
    """Tokens at the front of a rollout's windows that are computed once for all of them, where the
    pinned prefix is as long; 0 computes every window whole. The gradient is the same."""
    pack: bool
    """Whether short windows share a row of splitting.context_limit tokens, one behind another, so
    that little padding is computed; windows that share a prefix are left as they are. The gradient
    is the same."""
    micro_batch: int = Field(gt=0)
    """Rows of windows, or rollouts that share a prefix, a gradient call; rounded up to what the
    mesh's data, fsdp and expert share evenly."""
    remat: Remat | Literal["auto"]
    """What a layer keeps for its backward pass: none recomputes nothing, full everything but the
    layer's input; attention keeps what attention gave, dots the results of matrix products. auto
    takes what recomputes least and fits into the devices' memory."""
    scan_layers: bool
    """Whether layers are one compiled loop. One by one they take longer to compile, and on a GPU a
    step takes about 3% less time."""
    router_bias_rate: float = Field(ge=0)
    """What a step moves the routers' biases by to even out the load of experts; 0 leaves them."""
    clip: float = Field(gt=0)
    """How far the probability ratio may move from 1."""
    importance_cap: float = Field(gt=0)
    """Largest weight for samples of a policy that differs from the trained one."""
    kl_beta: float = Field(ge=0)
    """Weight of the divergence from the policy RL starts from."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...]
    """Where metrics are shown beside metrics.jsonl; each needs the extra of its name."""
    optimizer: OptimizerSection
    lora: LoraSection
    stages: tuple[StageSection, ...] = Field(min_length=1)
    """The stages, shortest timeout first."""

    @model_validator(mode="after")
    def _adapts(self) -> "RlSection":
        check_lora("rl", self.lora, self.optimizer, self.router_bias_rate)
        return self

    @model_validator(mode="after")
    def _progressive(self) -> "RlSection":
        if self.optimizer.schedule != "constant":
            raise UserError(
                f"rl.optimizer.schedule={self.optimizer.schedule}: how many steps RL takes is "
                "known when it ends; use constant."
            )
        check_stages(self.timeline())
        return self

    def timeline(self) -> tuple[Stage, ...]:
        """The stages."""
        return tuple(
            Stage(stage.timeout_s, stage.max_steps, stage.advance_score, stage.min_steps)
            for stage in self.stages
        )
