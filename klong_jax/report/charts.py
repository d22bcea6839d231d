"""The report's charts: which data each shows, in which colours, and what it says in a sentence."""

import math
from collections.abc import Callable, Sequence
from html import escape

from klong_jax.report.data import POLICIES, POLICY_NAMES, EvalRow, Policy, RunReport
from klong_jax.report.regime import Regime
from klong_jax.report.svg import (
    Band,
    Panel,
    Series,
    doubling_stairs,
    histograms,
    line_chart,
    marker,
    scatter,
)

# Colours that stay apart for colour-blind readers and in grey print; policies differ in shape too.
POLICY_MARKS: dict[Policy, tuple[str, str]] = {
    "base": ("#6f7785", "circle"),
    "sft": ("#0072b2", "square"),
    "rl": ("#d55e00", "triangle"),
}
REGIME_COLOURS = {Regime.ORDINARY: "#a6cde5", Regime.LONG: "#3d8fc4", Regime.EXTREME: "#123a63"}
_NO_EVALS = "No evaluation has run yet."


def card(title: str, sentence: str, content: str, kind: str = "card") -> str:
    """A titled box with one explaining sentence; `content` is HTML."""
    say = f'<p class="say">{escape(sentence)}</p>' if sentence else ""
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{say}{content}</section>'


def swatch(colour: str, kind: str = "square") -> str:
    """A small marker beside a text."""
    return f'<svg viewBox="0 0 12 12" aria-hidden="true">{marker(kind, 6, 6, colour)}</svg>'


def sft_card(report: RunReport) -> str:
    """The loss curve of supervised fine-tuning."""
    drawn = [(step, loss) for step, loss in report.sft_loss if math.isfinite(loss)]
    content = (
        line_chart(drawn, "step", "loss (nats a trained token)", POLICY_MARKS["sft"][0], y_low=0.0)
        if drawn
        else _empty("No SFT step has run yet.")
    )
    return card(
        "Supervised fine-tuning",
        "The loss says how surprised the model is by each token the expert chose; it should fall.",
        content + _left_out(len(report.sft_loss) - len(drawn), "a loss that is not finite"),
    )


def position_card(report: RunReport) -> str:
    """The held-out loss along trajectories."""
    drawn = [
        (start, loss, f"tokens {start:,} to {2 * start - 1:,}: {loss:.4g} ({tokens:,} of them)")
        for start, loss, tokens in report.loss_by_position
        if math.isfinite(loss)
    ]
    content = (
        doubling_stairs(
            drawn, "tokens into the trajectory", "loss (nats a token)", POLICY_MARKS["sft"][0]
        )
        if drawn
        else _empty("No recordings were held out (data.heldout).")
    )
    return card(
        "Loss along trajectories",
        "Of recordings that were not trained on, at the last checkpoint; a loss that grows to the "
        "right is that of a policy that only learnt how trajectories begin.",
        content + _left_out(len(report.loss_by_position) - len(drawn), "a loss that is not finite"),
    )


def rl_card(report: RunReport) -> str:
    """The reward curve, over its stages."""
    points = [(p.step, p.mean_reward) for p in report.rl_steps if p.mean_reward is not None]
    content = (
        line_chart(
            points, "step", "mean reward", POLICY_MARKS["rl"][0], stage_bands(report), y_low=0.0
        )
        if points
        else _empty("No RL step has run yet.")
    )
    return card(
        "Progressive RL",
        "Mean judged score of the agent's own attempts; it should rise within a stage, and may dip "
        "where a new one begins.",
        content + _left_out(len(report.rl_steps) - len(points), "no valid rollout"),
    )


def stage_bands(report: RunReport) -> list[Band]:
    """One band for each run of steps in one stage; a boundary lies between two steps."""
    bands: list[Band] = []
    for point in report.rl_steps:
        label = f"stage {point.stage}"
        if bands and bands[-1].label == label:
            bands[-1] = Band(bands[-1].low, point.step + 0.5, label)
        else:
            bands.append(Band(point.step - 0.5, point.step + 0.5, label))
    return bands


def turns_card(report: RunReport) -> str:
    """How many turns attempts took."""
    return _distribution(
        report,
        "How many turns attempts take",
        "Each bar counts attempts; the darker its colour, the longer-horizon they were.",
        "assistant turns",
        lambda row: row.assistant_turns,
        least_step=1.0,
    )


def runtime_card(report: RunReport) -> str:
    """How long attempts ran."""
    return _distribution(
        report,
        "How long attempts run",
        "Active time counts generating and running tools, but not waiting in queues.",
        "active seconds",
        lambda row: row.active_s,
    )


def scatter_card(report: RunReport) -> str:
    """Score over context ratio."""
    series = [
        Series(
            POLICY_NAMES[policy],
            *POLICY_MARKS[policy],
            tuple(
                (row.context_ratio, row.score, f"{row.task_id}: {row.score:.2f}")
                for row in report.evals
                if row.policy == policy and row.score is not None
            ),
        )
        for policy in POLICIES
    ]
    shown = [one for one in series if one.points]
    keys = legend([(one.label, one.colour, one.marker) for one in shown])
    content = (
        keys + scatter(shown, "length over context limit", "score", 1.0, "context limit")
        if shown
        else _empty(_NO_EVALS)
    )
    missing = sum(row.score is None for row in report.evals)
    return card(
        "Score and length",
        "Each mark is one attempt; right of the dashed line the interaction no longer fits the "
        "context, and a good agent stays high there.",
        content + _left_out(missing, "no score"),
    )


def legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """(label, colour, marker) as a line of keys."""
    keys = "".join(f"<span>{swatch(c, kind)}{escape(label)}</span>" for label, c, kind in entries)
    return f'<div class="legend">{keys}</div>'


def _distribution(
    report: RunReport,
    title: str,
    sentence: str,
    label: str,
    value: Callable[[EvalRow], float],
    least_step: float = 0.0,
) -> str:
    panels = [
        Panel(
            POLICY_NAMES[policy],
            tuple((REGIME_COLOURS[r], _values(report, policy, r, value)) for r in Regime),
        )
        for policy in POLICIES
        if any(row.policy == policy for row in report.evals)
    ]
    keys = legend([(regime.value, REGIME_COLOURS[regime], "square") for regime in Regime])
    content = (
        keys + histograms(panels, label, least_step=least_step) if panels else _empty(_NO_EVALS)
    )
    return card(title, sentence, content)


def _values(
    report: RunReport, policy: Policy, regime: Regime, value: Callable[[EvalRow], float]
) -> tuple[float, ...]:
    return tuple(
        value(row) for row in report.evals if row.policy == policy and report.regime(row) is regime
    )


def _empty(text: str) -> str:
    return f'<p class="empty">{escape(text)}</p>'


def _left_out(count: int, reason: str) -> str:
    return f'<p class="soft">Not drawn: {count} with {reason}.</p>' if count else ""
