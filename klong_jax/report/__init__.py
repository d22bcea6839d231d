"""The report of a run: plain data in, a self-contained HTML page and terminal tables out."""

from klong_jax.report.data import EvalRow, RlPoint, RunReport, read_report
from klong_jax.report.html import render_html, write_report
from klong_jax.report.regime import Regime, classify
from klong_jax.report.summary import PolicySummary, summarise
from klong_jax.report.table import print_summary, summary_table

__all__ = [
    "EvalRow",
    "PolicySummary",
    "Regime",
    "RlPoint",
    "RunReport",
    "classify",
    "print_summary",
    "read_report",
    "render_html",
    "summarise",
    "summary_table",
    "write_report",
]
