"""`klong report`: prints the results of a run and draws its page again."""

from rich.console import Console

from klong_jax.pipelines.config.commands import ReportConfig
from klong_jax.report import print_summary, read_report, write_report


def run(settings: ReportConfig) -> None:
    """Reads report.json, prints the table and rewrites report.html."""
    report = read_report(settings.path)
    print_summary(report, Console())
    print(f"report: {write_report(settings.path, report)}")
