"""A task: what an agent is asked to do, with what, how long, and how it is judged."""

from dataclasses import dataclass, field
from pathlib import Path

from klong_jax.core.rubric import RubricNode


@dataclass(frozen=True)
class Budget:
    """What a rollout may spend.

    Attributes:
        timeout_s: Active seconds (see `klong_jax.core.clock`).
        max_turns: Assistant turns.
        tool_timeout_s: Wall-clock seconds of one command.
    """

    timeout_s: float
    max_turns: int = 10_000
    tool_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.timeout_s <= 0 or self.max_turns <= 0 or self.tool_timeout_s <= 0:
            raise ValueError(f"a budget must be positive: {self}")


@dataclass(frozen=True)
class Task:
    """One task in PaperBench's layout.

    Attributes:
        task_id: Unique name.
        title: Name of the paper.
        instructions: What the agent is told to do, beside reading the paper.
        paper: Sections of paper.md in order, each with its heading.
        addendum: What the paper's authors add; may be empty.
        blacklist: Resources the agent must not touch, one a line.
        rubric: How the result is judged.
        workspace: Files the workspace starts with, relative path to content.
        finish_check: Command that must succeed in the sandbox before the agent may end; may be
            empty.
        image: Sandbox image, or None for the backend's default.
        root: Directory the task was read from.
    """

    task_id: str
    title: str
    instructions: str
    paper: tuple[str, ...]
    addendum: str
    blacklist: tuple[str, ...]
    rubric: RubricNode
    root: Path
    workspace: dict[str, str] = field(default_factory=dict)
    finish_check: str = ""
    image: str | None = None
