"""The page: one self-contained HTML file that reads from top to bottom like the run."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from klong_jax.core.jsonio import write_json, write_text
from klong_jax.report import charts
from klong_jax.report.charts import POLICY_MARKS, REGIME_COLOURS, swatch
from klong_jax.report.data import POLICIES, POLICY_NAMES, RunReport
from klong_jax.report.regime import Regime
from klong_jax.report.summary import PolicySummary, mean, summarise
from klong_jax.report.words import counts, number, percent, seconds

# How many attempts the page shows in its table; report.json holds them all.
_MOST_ROWS = 1_000


def write_report(folder: Path, report: RunReport) -> Path:
    """Writes report.json and report.html into a run's folder; returns the page's path."""
    write_json(folder / "report.json", report.to_json())
    page = folder / "report.html"
    write_text(page, render_html(report))
    return page


def render_html(report: RunReport) -> str:
    """The page as text; it loads nothing from anywhere."""
    lines = summarise(report)
    header = (
        f"<header><h1>{escape(report.title)}</h1>"
        f'<p class="soft">Run {escape(report.run_id)}</p></header>'
    )
    body = [header, _tiles(lines), _notes(report)]
    if report.sft_loss and not (report.rl_steps or report.evals):
        # A run of SFT alone says nothing of how the policy acts.
        body.append(_pair(charts.sft_card(report), charts.position_card(report)))
    else:
        body += [
            _summary(report, lines),
            _pair(charts.sft_card(report), charts.rl_card(report)),
            _stages(report),
            _pair(charts.turns_card(report), charts.runtime_card(report)),
            _pair(charts.scatter_card(report), _regimes(report, lines)),
            _attempts(report),
        ]
    body.append(_pair(_timings(report), _config(report)))
    return page(report.title, "".join(body))


def _pair(left: str, right: str) -> str:
    return f'<div class="pair">{left}{right}</div>'


def page(title: str, body: str) -> str:
    """A self-contained page around HTML in the report's style."""
    style = stylesheet("style.css") + stylesheet("charts.css")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def stylesheet(name: str) -> str:
    """The text of a stylesheet: style.css for pages, charts.css for what is drawn in them."""
    return files("klong_jax.report").joinpath(name).read_text(encoding="utf-8")


def _tiles(lines: Sequence[PolicySummary]) -> str:
    tiles = [
        f'<div class="card tile" style="--colour:{POLICY_MARKS[line.policy][0]}">'
        f'<span class="soft">{POLICY_NAMES[line.policy]}</span>'
        f"<b>{number(line.mean_score)}</b>"
        f'<span class="soft">mean score, {percent(line.solved_share)} solved</span></div>'
        for line in lines
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _notes(report: RunReport) -> str:
    if not report.notes:
        return ""
    items = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    return charts.card("Notes", "", items)


def _summary(report: RunReport, lines: Sequence[PolicySummary]) -> str:
    headings = ("Policy", "#Attempts", "#Mean score", "#Solved", "#Turns", "#Active time",
                "#Overflowing", "Endings", "Failures")  # fmt: skip
    rows = [
        (
            POLICY_NAMES[line.policy],
            f"{line.attempts}" + _unjudged(line),
            number(line.mean_score, 3),
            percent(line.solved_share),
            number(line.mean_turns, 1),
            seconds(line.mean_active_s),
            percent(line.overflow_share),
            counts(line.statuses),
            counts(line.failures),
        )
        for line in lines
    ]
    return charts.card(
        "Before and after training",
        "Each row is one policy on the same evaluation tasks; a task is solved when its score is "
        "full, and overflows when its interaction is longer than the context.",
        _table(headings, rows, "No evaluation has run yet."),
    )


def _unjudged(line: PolicySummary) -> str:
    missing = line.attempts - line.judged
    return f" ({missing} not judged)" if missing else ""


def _regimes(report: RunReport, lines: Sequence[PolicySummary]) -> str:
    headings = ("Regime", *(f"#{POLICY_NAMES[line.policy]}" for line in lines))
    rows = [
        (regime.value, *(_regime_cell(line, regime) for line in lines))
        for regime in Regime
        if lines
    ]
    return charts.card(
        "Score by regime",
        "Mean score and number of attempts: ordinary ones fit the context, long-horizon ones "
        "overflow it, extremely long-horizon ones overflow it and run for more than "
        f"{seconds(report.extreme_s)} of active time.",
        _table(headings, rows, "No evaluation has run yet."),
    )


def _regime_cell(line: PolicySummary, regime: Regime) -> str:
    attempts = line.regimes[regime]
    return f"{number(mean(line.regime_scores[regime]), 3)} (n = {attempts})" if attempts else "–"


def _stages(report: RunReport) -> str:
    headings = ("Stage", "#Steps", "#Reward", "#Turns", "#Active time", "#Timeouts", "#Invalid",
                "#KL", "#Loss")  # fmt: skip
    rows = []
    for stage in sorted({point.stage for point in report.rl_steps}):
        points = [point for point in report.rl_steps if point.stage == stage]
        rewards = [point.mean_reward for point in points if point.mean_reward is not None]
        rows.append(
            (
                f"{stage}",
                f"{len(points)}",
                number(mean(rewards), 3),
                number(mean([point.mean_turns for point in points]), 1),
                seconds(mean([point.mean_active_s for point in points])),
                f"{sum(point.timeouts for point in points)}",
                f"{sum(point.invalid for point in points)}",
                number(mean([point.kl for point in points]), 4),
                number(mean([point.loss for point in points]), 4),
            )
        )
    return charts.card(
        "Progressive RL, stage by stage",
        "Each stage allows a longer time limit than the one before; timeouts and invalid rollouts "
        "are counted, everything else is the mean over the stage's steps.",
        _table(headings, rows, "No RL step has run yet."),
    )


def _attempts(report: RunReport) -> str:
    headings = ("Task", "Size", "Policy", "#Score", "#Turns", "#Active time", "#Context",
                "#Windows", "Regime", "Ending", "Failures")  # fmt: skip
    ordered = sorted(report.evals, key=lambda row: (row.task_id, POLICIES.index(row.policy)))
    rows, chips = [], []
    for row in ordered[:_MOST_ROWS]:
        regime = report.regime(row)
        chips.append(REGIME_COLOURS[regime])
        rows.append(
            (
                row.task_id,
                row.size,
                POLICY_NAMES[row.policy],
                number(row.score),
                f"{row.assistant_turns}",
                seconds(row.active_s),
                f"{row.context_ratio:.2f}×",
                f"{row.windows}",
                regime.value,
                row.status,
                counts(row.failures),
            )
        )
    hidden = len(ordered) - len(rows)
    more = f'<p class="soft">{hidden} more attempts are in report.json.</p>' if hidden else ""
    return charts.card(
        "Every attempt",
        "Context is the length of the whole interaction as a multiple of the context limit; "
        "windows is how many pieces the agent saw it in.",
        _table(headings, rows, "No evaluation has run yet.", {"Regime": chips}) + more,
        kind="card long",
    )


def _timings(report: RunReport) -> str:
    rows = [(stage, seconds(spent)) for stage, spent in report.timings.items()]
    if len(rows) > 1:
        rows.append(("total", seconds(sum(report.timings.values()))))
    return charts.card(
        "Where the time went",
        "Wall-clock time of each stage of the run.",
        _table(("Stage", "#Time"), rows, "No stage has finished yet."),
    )


def _config(report: RunReport) -> str:
    rows = [(key, f"{value}") for key, value in report.config_summary.items()]
    return charts.card(
        "Settings",
        "The settings that shaped this run.",
        _table(("Setting", "Value"), rows, "No settings were recorded."),
    )


def _table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    empty: str,
    chips: dict[str, list[str]] | None = None,
) -> str:
    """A table; a heading that starts with # is of a column of numbers.

    Args:
        headings: Of the columns.
        rows: Cells as plain text; they are escaped here.
        empty: What to say without rows.
        chips: Column to the colour that each row's cell is marked with.
    """
    if not rows:
        return f'<p class="empty">{escape(empty)}</p>'
    kinds = [' class="n"' if heading.startswith("#") else "" for heading in headings]
    names = [heading.lstrip("#") for heading in headings]
    head = "".join(f"<th{k}>{escape(name)}</th>" for k, name in zip(kinds, names, strict=True))
    lines = []
    for index, row in enumerate(rows):
        cells = []
        for kind, name, cell in zip(kinds, names, row, strict=True):
            if chips and name in chips:
                mark = swatch(chips[name][index])
                cells.append(f'<td class="chip">{mark}{escape(cell)}</td>')
            else:
                cells.append(f"<td{kind}>{escape(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
