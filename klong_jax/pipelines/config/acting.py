"""Settings of what acts: where rollouts run, how long, on which tasks, taught by whom."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from klong_jax.pipelines.config.section import Section
from klong_jax.pipelines.config.training import SplittingSection


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
    lapse_rate: float = Field(ge=0, lt=1)
    """Of the scripted expert: share of turns that talk instead of act, or act before reading."""


class DistillSection(Section):
    """Demonstrations by rejection sampling."""

    min_score: float = Field(ge=0, le=1)
    """Judged score below which a demonstration is rejected."""
    timeout_s: float = Field(gt=0)
    """Active seconds a demonstration may take."""
    concurrency: int = Field(gt=0)
    """Demonstrations at once."""
    context: SplittingSection
    """The teacher's own context, in tokens of the bundled tokenizer."""


class EvalSection(Section):
    """Evaluation on held-out tasks."""

    rollouts: int = Field(gt=0)
    """Attempts a task."""
    timeout_s: float = Field(gt=0)
    """Active seconds an attempt may take."""
    extreme_s: float = Field(gt=0)
    """Active seconds from which an overflowing attempt counts as extremely long-horizon."""
