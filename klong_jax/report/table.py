"""The table printed at the end of a run."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from klong_jax.report.data import POLICY_NAMES, RunReport
from klong_jax.report.regime import Regime
from klong_jax.report.summary import PolicySummary, summarise
from klong_jax.report.words import number, percent, seconds


def summary_table(report: RunReport) -> Table:
    """Base, SFT and RL side by side, a policy a column: narrow enough for any terminal."""
    lines = summarise(report)
    table = Table(title=Text(report.title), caption=Text(f"run {report.run_id}"))
    table.add_column("")
    for line in lines:
        table.add_column(POLICY_NAMES[line.policy], justify="right")
    cells = [_cells(line) for line in lines]
    for heading in cells[0] if cells else ():
        table.add_row(heading, *(column[heading] for column in cells))
    failures = {name for line in lines for name in line.failures}
    for index, name in enumerate(sorted(failures)):
        if index == 0:
            table.add_section()
        # Text, because a category's name may look like console markup.
        counted = (str(line.failures.get(name, 0)) for line in lines)
        table.add_row(Text(f"failures: {name}"), *counted)
    return table


def print_summary(report: RunReport, console: Console) -> None:
    """Prints the table, or that nothing was evaluated, and the run's notes."""
    if report.evals:
        console.print(summary_table(report))
    else:
        console.print(Text(f"{report.title}: no evaluation has run yet."))
    for note in report.notes:
        console.print(Text(note))


def _cells(line: PolicySummary) -> dict[str, str]:
    return {
        "attempts": str(line.attempts),
        "mean score": number(line.mean_score, 3),
        "solved": percent(line.solved_share),
        "mean turns": number(line.mean_turns, 1),
        "mean active time": seconds(line.mean_active_s),
        "overflowing the context": percent(line.overflow_share),
        **{regime.value: str(line.regimes[regime]) for regime in Regime},
        "not judged": str(line.attempts - line.judged),
    }
