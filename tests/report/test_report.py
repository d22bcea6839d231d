"""The report: numbers that equal the data, a page that stands alone and survives anything."""

import itertools
import re
from html import unescape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import write_json
from klong_jax.report import (
    EvalRow,
    Regime,
    RlPoint,
    RunReport,
    classify,
    print_summary,
    read_report,
    render_html,
    summarise,
    write_report,
)

HOSTILE = "<script>alert('x')</script> & \"[bold]\" \u2028"


def row(policy: Any = "base", **changes: Any) -> EvalRow:
    fields: dict[str, Any] = {
        "task_id": "t1",
        "size": "8 components",
        "score": 0.5,
        "assistant_turns": 10,
        "active_s": 30.0,
        "context_ratio": 0.5,
        "windows": 1,
        "status": "done",
        "failures": {},
    }
    return EvalRow(policy, **{**fields, **changes})


def point(step: int, stage: int, **changes: Any) -> RlPoint:
    fields: dict[str, Any] = {
        "mean_reward": 0.5,
        "mean_turns": 10.0,
        "mean_active_s": 60.0,
        "timeouts": 1,
        "kl": 0.01,
        "loss": -0.1,
        "invalid": 0,
    }
    return RlPoint(step, stage, **{**fields, **changes})


def full() -> RunReport:
    return RunReport(
        title="A run",
        run_id="r1",
        extreme_s=100.0,
        config_summary={"limit": 1024},
        sft_loss=((0, 3.0), (1, float("nan")), (2, 1.0)),
        loss_by_position=((64, 2.5, 40), (128, 2.0, 300)),
        rl_steps=(point(0, 0), point(1, 0, mean_reward=None, invalid=4), point(2, 1, timeouts=3)),
        evals=(
            row(score=0.25, failures={"bad_call": 2}),
            row(score=None, assistant_turns=30, context_ratio=1.5, status="timeout"),
            row("rl", score=1.0, context_ratio=2.0, active_s=90.0),
            row("rl", score=0.5, context_ratio=3.0, active_s=5400.0, failures={"bad_call": 1}),
        ),
        timings={"sft": 90.0, "rl": 7200.0},
        notes=("Mind the gap.",),
    )


class Page(HTMLParser):
    """The texts of a page's table cells, by heading, and the tags it uses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._heading = ""
        self._text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag in ("h2", "td"):
            self._text = []
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "h2":
            self._heading = "".join(self._text)
        if tag == "td":
            self.tables[self._heading][-1].append("".join(self._text))

    def rows(self, heading: str) -> list[list[str]]:
        return [cells for cells in self.tables[heading] if cells]


@pytest.mark.parametrize(
    ("ratio", "active_s", "expected"),
    [
        (0.2, 1e6, Regime.ORDINARY),
        (1.0, 1e6, Regime.ORDINARY),
        (1.001, 0.0, Regime.LONG),
        (1.001, 100.0, Regime.LONG),
        (1.001, 100.1, Regime.EXTREME),
    ],
)
def test_regime_boundaries(ratio: float, active_s: float, expected: Regime) -> None:
    assert classify(ratio, active_s, extreme_s=100.0) is expected


def test_the_overflow_threshold_is_a_parameter() -> None:
    assert classify(1.5, 1.0, extreme_s=100.0, overflow_ratio=2.0) is Regime.ORDINARY


def test_summaries_equal_the_data_and_an_unjudged_attempt_is_no_zero() -> None:
    base, rl = summarise(full())
    assert (base.policy, base.attempts, base.judged) == ("base", 2, 1)
    assert (base.mean_score, base.solved_share) == (0.25, 0.0)
    assert (base.mean_turns, base.mean_active_s, base.overflow_share) == (20.0, 30.0, 0.5)
    assert base.statuses == {"done": 1, "timeout": 1}
    assert (rl.mean_score, rl.solved_share, rl.overflow_share) == (0.75, 0.5, 1.0)
    assert rl.regimes == {Regime.ORDINARY: 0, Regime.LONG: 1, Regime.EXTREME: 1}
    assert rl.regime_scores[Regime.EXTREME] == (0.5,)
    assert rl.failures == {"bad_call": 1}


def test_the_page_shows_the_numbers_of_the_data() -> None:
    page = Page(render_html(full()))
    assert page.rows("Before and after training") == [
        ["Base", "2 (1 not judged)", "0.250", "0%", "20.0", "30.0 s", "50%",
         "done 1, timeout 1", "bad_call 2"],
        ["RL", "2", "0.750", "50%", "10.0", "45.8 min", "100%", "done 2", "bad_call 1"],
    ]  # fmt: skip
    assert page.rows("Score by regime") == [
        ["ordinary", "0.250 (n = 1)", "–"],
        ["long-horizon", "– (n = 1)", "1.000 (n = 1)"],
        ["extremely long-horizon", "–", "0.500 (n = 1)"],
    ]
    assert page.rows("Progressive RL, stage by stage") == [
        ["0", "2", "0.500", "10.0", "1.0 min", "2", "4", "0.0100", "-0.1000"],
        ["1", "1", "0.500", "10.0", "1.0 min", "3", "0", "0.0100", "-0.1000"],
    ]
    assert page.rows("Every attempt")[-1] == [
        "t1", "8 components", "RL", "0.50", "10", "1.5 h", "3.00×", "1",
        "extremely long-horizon", "done", "bad_call 1",
    ]  # fmt: skip
    assert page.rows("Where the time went") == [
        ["sft", "1.5 min"],
        ["rl", "2.0 h"],
        ["total", "2.0 h"],
    ]


def test_the_charts_hold_every_point_and_say_what_they_leave_out() -> None:
    page = render_html(full())
    assert "Not drawn: 1 with a loss that is not finite." in page
    assert "Not drawn: 1 with no valid rollout." in page
    assert "Not drawn: 1 with no score." in page
    polylines = re.findall(r'<polyline points="([^"]*)"', page)
    assert [len(line.split()) for line in polylines] == [2, 2]
    assert re.findall(r">(stage \d)<", page) == ["stage 0", "stage 1"]
    scores = [unescape(title) for title in re.findall(r"<title>(t1: [^<]*)</title>", page)]
    assert scores == ["t1: 0.25", "t1: 1.00", "t1: 0.50"]
    bars = re.findall(r"<title>[\d.]+ to [\d.]+: (\d+)</title>", page)
    assert sum(map(int, bars)) == 2 * len(full().evals)  # in turns and in runtime


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    page = Page(render_html(full()))
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert page.links == []
    assert "url(" not in render_html(full()) and "@import" not in render_html(full())


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    report = RunReport(
        title=HOSTILE,
        run_id=HOSTILE,
        extreme_s=1.0,
        config_summary={HOSTILE: HOSTILE},
        evals=(row(task_id=HOSTILE, size=HOSTILE, status=HOSTILE, failures={HOSTILE: 1}),),
        timings={HOSTILE: 1.0},
        notes=(HOSTILE,),
    )
    page = render_html(report)
    assert "<script" not in page
    parsed = Page(page)
    assert parsed.rows("Every attempt")[0][0] == HOSTILE
    assert parsed.rows("Settings") == [[HOSTILE, HOSTILE]]
    assert parsed.rows("Where the time went") == [[HOSTILE, "1.0 s"]]


def test_what_has_not_run_yet_is_said() -> None:
    page = render_html(RunReport("Early", "r0", 100.0))
    for words in ("No evaluation has run yet.", "No SFT step has run yet.",
                  "No RL step has run yet.", "No stage has finished yet.",
                  "No settings were recorded."):  # fmt: skip
        assert words in page
    assert "<svg" not in page


def test_a_run_of_sft_alone_shows_the_loss_along_trajectories_and_nothing_of_acting() -> None:
    steps = ((64, 0.5, 40), (128, float("nan"), 7), (1024, 2.0, 1300))
    page = render_html(RunReport("SFT", "r", 0.0, sft_loss=((1, 3.0),), loss_by_position=steps))
    assert "tokens 64 to 127: 0.5 (40 of them)" in page
    assert "tokens 1,024 to 2,047: 2 (1,300 of them)" in page
    assert "tokens 128" not in page and "1 with a loss that is not finite" in page
    places = [
        float(re.findall(f'<text x="([\\d.]+)"[^>]*class="tick"[^>]*>{said}<', page)[-1])
        for said in ("64", "128", "256", "512", "1,024", "2,048")
    ]
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert gaps == pytest.approx([gaps[0]] * 5, abs=0.2), "each tick is double the last"
    assert "Every attempt" not in page and "Progressive RL" not in page
    alone = render_html(RunReport("SFT", "r", 0.0, sft_loss=((1, 3.0),)))
    assert "No recordings were held out (data.heldout)." in alone


def test_the_report_survives_its_file(tmp_path: Path) -> None:
    report = RunReport(**{**vars(full()), "sft_loss": ((0, 3.0),)})  # nan is not equal to itself
    page = write_report(tmp_path / "run", report)
    again = read_report(tmp_path / "run")
    assert again == report
    assert render_html(again) == page.read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [[], {}, {"title": "x", "run_id": "y", "extreme_s": 1.0}])
def test_a_file_that_is_no_report_is_named(tmp_path: Path, content: Any) -> None:
    write_json(tmp_path / "report.json", content)
    with pytest.raises(UserError, match=r"report\.json"):
        read_report(tmp_path)


def test_impossible_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="policy must be one of"):
        row("dpo")
    with pytest.raises(ValueError, match="outside"):
        row(score=1.5)


def printed(report: RunReport) -> str:
    out = StringIO()
    print_summary(report, Console(file=out, width=80))
    return out.getvalue()


def test_the_terminal_table_equals_the_data_and_fits_eighty_columns() -> None:
    text = printed(full())
    cells = {
        parts[0]: parts[1:]
        for line in text.splitlines()
        if len(parts := [part.strip() for part in line.strip("│┃").split("│")]) > 1
    }
    assert cells["mean score"] == ["0.250", "0.750"]
    assert cells["overflowing the context"] == ["50%", "100%"]
    assert cells["extremely long-horizon"] == ["0", "1"]
    assert cells["not judged"] == ["1", "0"]
    assert cells["failures: bad_call"] == ["2", "1"]
    assert "…" not in text and "Mind the gap." in text


def test_the_terminal_prints_markup_as_it_is_and_says_when_nothing_ran() -> None:
    odd = RunReport("[red]odd[/nothing]", "r", 1.0, evals=(row(failures={"[/x]": 1}),))
    assert "[red]odd[/nothing]" in printed(odd) and "[/x]" in printed(odd)
    assert "no evaluation has run yet" in printed(RunReport("Early", "r0", 1.0))


numbers = st.floats(0, 1e7, allow_nan=False)
losses = st.floats(-1e30, 1e30) | st.sampled_from([float("nan"), float("inf")])
rows = st.builds(
    row,
    st.sampled_from(["base", "sft", "rl"]),
    score=st.none() | st.floats(0, 1),
    assistant_turns=st.integers(0, 10**6),
    active_s=numbers,
    context_ratio=numbers,
)


@given(
    st.lists(rows, max_size=6),
    st.lists(st.tuples(st.integers(0, 10**6), losses), max_size=6),
)
def test_any_data_renders(evals: list[EvalRow], curve: list[tuple[int, float]]) -> None:
    report = RunReport("x", "y", 100.0, sft_loss=tuple(curve), evals=tuple(evals))
    page = render_html(report)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', page)
    assert len(Page(page).tables.get("Every attempt", [])) == (len(evals) + 1 if evals else 0)
