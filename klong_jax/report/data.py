"""What a report shows, as plain data: any pipeline can fill it, and it survives as report.json."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import read_json
from klong_jax.report.regime import Regime, classify

Policy = Literal["base", "sft", "rl"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
POLICY_NAMES: dict[Policy, str] = {"base": "Base", "sft": "SFT", "rl": "RL"}


@dataclass(frozen=True)
class RlPoint:
    """One RL step.

    Attributes:
        step: The step's number.
        stage: Index of the stage it belongs to.
        mean_reward: Mean judged score of the valid rollouts; None when there were none.
        mean_turns: Mean assistant turns.
        mean_active_s: Mean active seconds.
        timeouts: Rollouts that ran out of time.
        kl: Divergence from the reference policy.
        loss: The loss.
        invalid: Rollouts lost to the infrastructure or to the judge.
    """

    step: int
    stage: int
    mean_reward: float | None
    mean_turns: float
    mean_active_s: float
    timeouts: int
    kl: float
    loss: float
    invalid: int


@dataclass(frozen=True)
class EvalRow:
    """One attempt of one policy at one evaluation task.

    Attributes:
        policy: Which training stage's policy.
        task_id: The task.
        size: How large the task is, in words, such as "24 components".
        score: The judged score in [0, 1]; None when the judge failed.
        assistant_turns: How often the agent spoke.
        active_s: Active seconds used.
        context_ratio: Tokens of the whole interaction over the context limit.
        windows: Windows the interaction was seen through.
        status: How the attempt ended.
        failures: Failure category to count.
    """

    policy: Policy
    task_id: str
    size: str
    score: float | None
    assistant_turns: int
    active_s: float
    context_ratio: float
    windows: int
    status: str
    failures: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        if self.score is not None and not 0.0 <= self.score <= 1.0:
            raise ValueError(f"{self.task_id}: score {self.score} is outside [0, 1]")


@dataclass(frozen=True)
class RunReport:
    """Everything the report of a run shows.

    Attributes:
        title: Heading of the page.
        run_id: Name of the run.
        extreme_s: Active seconds that make an overflowing attempt extremely long-horizon.
        config_summary: The settings worth naming.
        sft_loss: (step, loss) of supervised fine-tuning.
        loss_by_position: (N, held-out loss, tokens) of what stands N to 2 N - 1 tokens into its
            trajectory, N a power of two, ascending; of the last checkpoint of supervised
            fine-tuning.
        rl_steps: The RL steps.
        evals: The evaluation attempts.
        timings: Stage to wall-clock seconds.
        notes: Sentences that a reader should know.
    """

    title: str
    run_id: str
    extreme_s: float
    config_summary: dict[str, Any] = field(default_factory=dict)
    sft_loss: tuple[tuple[int, float], ...] = ()
    loss_by_position: tuple[tuple[int, float, int], ...] = ()
    rl_steps: tuple[RlPoint, ...] = ()
    evals: tuple[EvalRow, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def regime(self, row: EvalRow) -> Regime:
        """The regime of an attempt, by this run's threshold."""
        return classify(row.context_ratio, row.active_s, extreme_s=self.extreme_s)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "RunReport":
        """Reads what `to_json` wrote."""
        return RunReport(
            **{
                **value,
                "sft_loss": tuple((step, loss) for step, loss in value["sft_loss"]),
                # Reports of earlier versions have none.
                "loss_by_position": tuple(
                    (start, loss, tokens)
                    for start, loss, tokens in value.get("loss_by_position", ())
                ),
                "rl_steps": tuple(RlPoint(**point) for point in value["rl_steps"]),
                "evals": tuple(EvalRow(**row) for row in value["evals"]),
                "notes": tuple(value["notes"]),
            }
        )


def read_report(folder: Path) -> RunReport:
    """Reads the report.json of a run's folder.

    Raises:
        UserError: The file is missing or does not hold a report.
    """
    path = folder / "report.json"
    value = read_json(path)
    try:
        return RunReport.from_json(value)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no run report ({error}); run the evaluation again.") from None
