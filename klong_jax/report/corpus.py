"""How a corpus of trajectories splits into windows, drawn: one picture, or a page around it."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from klong_jax.report.charts import card
from klong_jax.report.html import page, stylesheet
from klong_jax.report.svg import WIDTH, Panel, histograms, line_chart

_COLOUR = "#0072b2"
_HEADING, _GAP, _MARGIN = 56, 20, 12


@dataclass(frozen=True)
class CorpusFigures:
    """What is drawn.

    Attributes:
        title: Names the corpus.
        sentence: Sums it up.
        windows: Windows of each trajectory.
        tokens: Tokens of each trajectory.
        trained: (tokens into the window, share of the tokens there that are trained), ascending.
    """

    title: str
    sentence: str
    windows: tuple[int, ...]
    tokens: tuple[int, ...]
    trained: tuple[tuple[float, float], ...]


class _Chart(NamedTuple):
    title: str
    sentence: str
    drawing: str
    height: int


def corpus_html(figures: CorpusFigures) -> str:
    """The charts as a self-contained page."""
    header = (
        f'<header><h1>{escape(figures.title)}</h1><p class="soft">{escape(figures.sentence)}</p>'
        "</header>"
    )
    cards = (card(chart.title, chart.sentence, chart.drawing) for chart in _charts(figures))
    return page(figures.title, header + "".join(cards))


def corpus_svg(figures: CorpusFigures) -> str:
    """The charts below each other, as one drawing that stands alone."""
    parts: list[str] = []
    top = _HEADING + _MARGIN
    for chart in _charts(figures):
        parts.append(_line(top, chart.title, "panel-label"))
        place = f'<svg x="{_MARGIN}" y="{top + 10}" width="{WIDTH}" height="{chart.height}" '
        parts.append(chart.drawing.replace("<svg ", place, 1))
        top += 10 + chart.height + _GAP
    width = WIDTH + 2 * _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" width="{width}" '
        f'height="{top}"><title>{escape(figures.title)}</title>'
        f"<style>{stylesheet('charts.css')}</style>"
        f'<rect width="{width}" height="{top}" fill="#fff"/>'
        f"{_line(22, figures.title, 'panel-label')}{_line(40, figures.sentence, 'axis-label')}"
        f"{''.join(parts)}</svg>\n"
    )


def _charts(figures: CorpusFigures) -> list[_Chart]:
    share = line_chart(
        figures.trained, "tokens into the window", "trained share", _COLOUR, y_low=0.0
    )
    return [
        _histogram(
            "Windows a trajectory",
            "Each bar counts trajectories; those of one window fit the context.",
            "windows",
            figures.windows,
        ),
        _histogram(
            "Tokens a trajectory",
            "The whole interaction, each token counted once.",
            "tokens",
            figures.tokens,
        ),
        _Chart(
            "Trained share by position",
            "Of the tokens that stand there in a window: pinned and overlapping tokens and what "
            "the environment said are context only.",
            share,
            300,
        ),
    ]


def _histogram(title: str, sentence: str, label: str, values: Sequence[int]) -> _Chart:
    panel = Panel("trajectories", ((_COLOUR, tuple(map(float, values))),))
    drawing = histograms([panel], label, bins=30, least_step=1.0, counted="Trajectories")
    return _Chart(title, sentence, drawing, 138)


def _line(y: int, text: str, kind: str) -> str:
    return f'<text x="{_MARGIN}" y="{y}" class="{kind}">{escape(text)}</text>'
