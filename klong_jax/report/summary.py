"""The numbers a reader looks at first: one line a policy."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from klong_jax.report.data import POLICIES, EvalRow, Policy, RunReport
from klong_jax.report.regime import Regime

# A weighted mean of full grades may miss 1 by rounding.
_SOLVED = 1.0 - 1e-9


@dataclass(frozen=True)
class PolicySummary:
    """How one policy did over its attempts.

    Attributes:
        policy: The policy.
        attempts: Number of attempts.
        judged: Attempts with a score; the score figures are over these alone.
        mean_score: Mean score; None when nothing was judged.
        solved_share: Share of judged attempts with the full score; None when nothing was judged.
        mean_turns: Mean assistant turns.
        mean_active_s: Mean active seconds.
        overflow_share: Share of attempts that overflowed the context.
        regime_scores: Regime to the scores of its judged attempts.
        regimes: Attempts in each regime.
        failures: Failure category to count, the most frequent first.
        statuses: Ending to count, the most frequent first.
    """

    policy: Policy
    attempts: int
    judged: int
    mean_score: float | None
    solved_share: float | None
    mean_turns: float
    mean_active_s: float
    overflow_share: float
    regime_scores: dict[Regime, tuple[float, ...]]
    regimes: dict[Regime, int]
    failures: dict[str, int]
    statuses: dict[str, int]


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def summarise(report: RunReport) -> tuple[PolicySummary, ...]:
    """One summary for each policy that was evaluated, in the order of training."""
    by_policy = {p: [row for row in report.evals if row.policy == p] for p in POLICIES}
    return tuple(_summary(report, policy, rows) for policy, rows in by_policy.items() if rows)


def _summary(report: RunReport, policy: Policy, rows: list[EvalRow]) -> PolicySummary:
    scores = [row.score for row in rows if row.score is not None]
    regimes = [report.regime(row) for row in rows]
    judged = [(g, row.score) for g, row in zip(regimes, rows, strict=True) if row.score is not None]
    failures: Counter[str] = Counter()
    for row in rows:
        failures.update(row.failures)
    return PolicySummary(
        policy=policy,
        attempts=len(rows),
        judged=len(scores),
        mean_score=mean(scores),
        solved_share=mean([score >= _SOLVED for score in scores]),
        mean_turns=sum(row.assistant_turns for row in rows) / len(rows),
        mean_active_s=sum(row.active_s for row in rows) / len(rows),
        overflow_share=sum(regime is not Regime.ORDINARY for regime in regimes) / len(rows),
        regime_scores={r: tuple(score for g, score in judged if g is r) for r in Regime},
        regimes={regime: regimes.count(regime) for regime in Regime},
        failures=dict(failures.most_common()),
        statuses=dict(Counter(row.status for row in rows).most_common()),
    )
