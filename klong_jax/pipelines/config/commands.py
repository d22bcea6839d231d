"""The settings of each command: what Hydra composes from configs/ must become one of these."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from klong_jax.core.errors import UserError
from klong_jax.pipelines.config.acting import (
    AgentSection,
    ClockSection,
    DistillSection,
    EngineSection,
    EvalSection,
    QueueSection,
    RunSection,
    SandboxSection,
    TasksSection,
    TeacherSection,
)
from klong_jax.pipelines.config.pods import (
    AotConfig,
    KernelsSection,
    MeshSection,
    ProcessesSection,
)
from klong_jax.pipelines.config.section import Section
from klong_jax.pipelines.config.training import (
    DataSection,
    DrillSection,
    ModelSection,
    RecordingSplittingSection,
    RlSection,
    SftSection,
    SplittingSection,
    TokenisedDataSection,
    TokenizerSection,
    TokenizerTraining,
    check_shared,
)


class ActingConfig(Section):
    """Lets policies act: they attempt tasks in sandboxes, served by the engine."""

    seed: int = Field(ge=0)
    """Everything random follows from it."""
    run: RunSection
    mesh: MeshSection
    kernels: KernelsSection
    clock: ClockSection
    sandbox: SandboxSection
    queue: QueueSection
    agent: AgentSection
    engine: EngineSection
    splitting: SplittingSection


class Reinforcing(ActingConfig):
    """Lets a policy learn from what it does."""

    rl: RlSection

    @model_validator(mode="after")
    def _prefix_fits(self) -> Self:
        check_shared("rl", self.rl.shared_prefix, self.splitting.context_limit)
        return self

    @model_validator(mode="after")
    def _needs_samples(self) -> Self:
        if self.engine.temperature == 0:
            raise UserError("engine.temperature=0: RL compares samples; set it above 0.")
        return self


class RecipeConfig(Reinforcing):
    """The whole recipe on generated tasks: demonstrations, SFT, progressive RL, report."""

    profile: Literal["smoke", "tiny"]
    """smoke trains a policy worth looking at in minutes; tiny only shows that every part runs."""
    tasks: TasksSection
    teacher: TeacherSection
    distill: DistillSection
    tokenizer: TokenizerTraining
    model: ModelSection
    splitting: RecordingSplittingSection
    lookup_drills: DrillSection
    component_drills: DrillSection
    sft: SftSection
    eval: EvalSection

    @model_validator(mode="after")
    def _shared_prefix_fits(self) -> Self:
        check_shared("sft", self.sft.shared_prefix, self.splitting.context_limit)
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
    distill: DistillSection


class SplitConfig(Section):
    """How recorded trajectories would be split into windows."""

    data: DataSection
    tokenizer: TokenizerSection
    splitting: RecordingSplittingSection
    output: Path | None
    """JSON file to write the plan into."""
    windows: Path | None
    """Folder to write each window into, as an ATIF document."""
    stats: bool
    """Say what the corpus comes to as a whole, instead of showing single plans; --stats for
    short."""
    plot: Path | None
    """File to draw the corpus into: .svg for one drawing, .html for a page."""

    @field_validator("plot")
    @classmethod
    def _drawable(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix not in (".svg", ".html"):
            raise UserError(f"plot={path}: must end in .svg or .html; rename it.")
        return path


class SftConfig(Section):
    """Supervised fine-tuning on recorded trajectories."""

    seed: int = Field(ge=0)
    """Everything random follows from it."""
    run: RunSection
    processes: ProcessesSection
    mesh: MeshSection
    kernels: KernelsSection
    data: TokenisedDataSection
    policy: Path | None
    """Folder of the policy to start from, such as one that klong convert made; null trains a new
    one from scratch."""
    tokenizer: TokenizerSection
    model: ModelSection
    splitting: RecordingSplittingSection
    sft: SftSection

    @model_validator(mode="after")
    def _prefix_fits(self) -> Self:
        check_shared("sft", self.sft.shared_prefix, self.splitting.context_limit)
        return self

    @model_validator(mode="after")
    def _starts_once(self, info: ValidationInfo) -> Self:
        given: list[str] = (info.context or {}).get("given", [])
        own = ("model", "tokenizer", "tokenizer.path")
        other = next((n for n in given if n in own or n.startswith("model.")), None)
        if self.policy is not None and other is not None:
            raise UserError(
                f"policy={self.policy}: brings its own model and tokenizer, which {other} "
                "contradicts; leave one of the two out."
            )
        return self


class RlConfig(Reinforcing):
    """Progressive RL from a policy that `klong sft` or an earlier RL wrote."""

    processes: ProcessesSection
    policy: Path
    """Folder of the policy to start from, such as runs/ID/sft."""
    tasks: Path
    """Folder of task folders."""


class EvalConfig(ActingConfig):
    """Evaluation of a policy on tasks."""

    policy: Path
    """Folder of the policy, such as runs/ID/rl."""
    tasks: Path
    """Folder of task folders."""
    eval: EvalSection


class ConvertConfig(Section):
    """Weights from a Hugging Face directory to a policy, or from a policy to such a directory."""

    source: Path
    """A Hugging Face directory to import, or the folder of a policy to export."""
    output: Path
    """Folder to make: a policy, or a directory that transformers loads."""
    original: Path | None
    """The Hugging Face directory that an exported policy came from: what the decoder has no use for
    is carried over from it, and each tensor is written in its dtype."""
    dtype: Literal["float32", "bfloat16"] | None
    """What the decoder's weights are cast to; null keeps each as it is."""
    compute: Literal["float32", "bfloat16"] | None
    """What an imported policy computes in; null is what the source's weights are stored in."""
    mesh: MeshSection
    shard_gb: float = Field(gt=0)
    """Most gigabytes in one file of an export."""
    overwrite: bool
    """Replace a model that is already in the output folder."""


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


class CorporaConfig(Section):
    """The tokenised corpora of klong sft: what lies on disk, and what may go."""

    path: Path
    """Folder of the corpora, as data.cache of klong sft."""
    older_than_days: float | None = Field(ge=0)
    """Only corpora that were last opened longer ago may go; null leaves age out."""
    keep: int | None = Field(ge=0)
    """So many of the last opened stay in any case; null leaves their number out."""
    prune: bool
    """Remove what may go, but for what a process makes or reads; false only shows it."""

    @model_validator(mode="after")
    def _says_what(self) -> Self:
        if self.prune and self.older_than_days is None and self.keep is None:
            raise UserError(
                "prune=true: say what may go with older_than_days=DAYS, keep=NUMBER or both; "
                "keep=0 takes all."
            )
        return self


class SandboxConfig(Section):
    """Sandboxes. Words before settings: serve, ps, exec ID COMMAND, logs ID, rm ID ..., doctor ...

    More words: image ..., pause ID ..., resume ID ..., snapshot ID, snapshots, drop DIGEST ...,
    install-egress
    """

    backend: Literal["local", "docker", "kubernetes"]
    """What sandboxes are made of."""
    isolation: Literal["auto", "bubblewrap", "none"]
    """Of the local backend; auto is bubblewrap, none runs commands as plain processes."""
    host: str
    """Address to serve on; one that others can reach needs a token."""
    port: int = Field(ge=0, le=65535)
    """Port to serve on; 0 takes a free one."""
    token_env: str | None
    """Environment variable that holds the bearer token to ask for."""
    state_dir: Path | None
    """Where workspaces live; null is the temporary directory."""
    pool: int = Field(ge=0)
    """Sandboxes kept ready, of the kinds asked for last; 0 makes each when it is asked for."""
    pool_idle_s: float = Field(gt=0)
    """Seconds that one is kept ready."""
    egress: Path | None
    """File of JSON that says how sandboxes are let out; null is by public indexes and DNS."""
    disk_mb: int | None
    """Of serve: megabytes that a sandbox which asks for no quota may write; 0 sets none, null is
    10 GB where this host can hold a quota."""
    url: str | None
    """Of all but serve and doctor: the service to ask; null is the one at host and port."""
    timeout_s: float = Field(gt=0)
    """Of exec: seconds until its command is killed."""
    image: str
    """Of doctor: the image that the docker backend takes by default."""
    task: Path | None
    """Of image build: a task's directory, whose requirements.txt, debian.txt make a layer."""
    requirements: Path | None
    """Of image build: a list for pip to make a layer of."""
    base: str | None
    """Of image build: the image to build on; null is the usual one."""
    source: Literal["auto", "registry", "debootstrap"]
    """Of image build: where the slim image's Debian comes from; auto asks the registry first."""
    without: list[str]
    """Of image build research: packages to leave out."""
    force: bool
    """Of image build: build also what is there already."""
    namespace: str = "klong-sandbox"
    """Of the kubernetes backend: where its pods are."""
    runtime_class: str | None = None
    """Of the kubernetes backend: RuntimeClass of the pods, such as gVisor's or Kata's; null is the
    cluster's default."""
    kubeconfig: str | None = None
    """Of the kubernetes backend: the file that says how to reach the cluster; null is the pod's
    own account inside one, elsewhere the usual file."""


class BenchConfig(Section):
    """The speed of a kernel beside its peers, of training on alike windows, or of sandboxes."""

    what: Literal["attention", "grouped_matmul", "linear_cross_entropy", "sft", "sandbox"]
    """The kernel, or sft, or sandbox."""
    backend: str | None
    """A kernel's backend; null takes the one of this platform."""
    table: Literal["windows", "trajectories", "growth", "longest", "mixture"] | None
    """One of the tables of sft: single windows beside peers; windows behind a common prefix; how
    time and memory grow with their number; long windows; a mixture of experts. null is all."""
    repeats: int = Field(gt=0)
    """Calls whose median time counts."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.what in ("sft", "sandbox") and self.backend is not None:
            raise UserError(
                f"backend={self.backend}: what={self.what} has no kernel of its own; leave it out."
            )
        if self.what != "sft" and self.table is not None:
            raise UserError(f"table={self.table}: only what=sft has tables; leave it out.")
        return self


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
    "convert": ConvertConfig,
    "aot": AotConfig,
    "rubric": RubricConfig,
    "report": ReportConfig,
    "corpora": CorporaConfig,
    "sandbox": SandboxConfig,
    "bench": BenchConfig,
    "doctor": DoctorConfig,
}
"""The settings of each command; configs/COMMAND.yaml holds their defaults."""
