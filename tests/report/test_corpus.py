"""The drawing of a corpus stands alone and shows what it was given."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

from klong_jax.report.corpus import CorpusFigures, corpus_html, corpus_svg

FIGURES = CorpusFigures(
    title="a<b>.jsonl: 4 trajectories",
    sentence="10% & more",
    windows=(1, 1, 1, 3),
    tokens=(100, 200, 300, 4000),
    trained=((5.0, 0.0), (15.0, 0.25), (25.0, 1.0)),
)
SVG = "{http://www.w3.org/2000/svg}"


def test_the_drawing_is_one_svg_that_needs_nothing_else() -> None:
    text = corpus_svg(FIGURES)
    root = ElementTree.fromstring(text)
    assert [child.tag for child in root if child.tag == f"{SVG}svg"] == [f"{SVG}svg"] * 3
    assert "var(" not in text
    assert "a<b>" not in text
    said = [title.text for title in root.iter(f"{SVG}title")]
    assert "1 to 2: 3" in said
    assert "3 to 4: 1" in said
    places = [(float(c.attrib["y"]), float(c.attrib["height"])) for c in root.iter(f"{SVG}svg")
              if c is not root]  # fmt: skip
    assert all(y + height <= below for (y, height), (below, _) in pairwise(places))
    assert sum(places[-1]) <= float(root.attrib["height"])


def test_every_chart_gets_the_height_it_draws() -> None:
    root = ElementTree.fromstring(corpus_svg(FIGURES))
    for chart in root.findall(f"{SVG}svg"):
        assert chart.attrib["viewBox"].split()[3] == chart.attrib["height"]


def test_the_page_holds_the_charts_and_escapes_names() -> None:
    text = corpus_html(FIGURES)
    assert text.count('role="img"') == 3
    assert "a&lt;b&gt;.jsonl" in text
    assert "10% &amp; more" in text
    assert not re.search(r'(src|href)="http', text)


def test_a_corpus_of_one_short_recording_is_drawn() -> None:
    one = replace(FIGURES, windows=(1,), tokens=(7,), trained=((0.5, 0.5),))
    assert corpus_svg(one).count('role="img"') == 3
