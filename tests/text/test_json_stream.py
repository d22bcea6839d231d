"""A list read item by item says what the standard library says of it, in the memory of one item."""

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.text.formats import read_recordings
from klong_jax.text.formats.stream import JsonText

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
texts = st.text(max_size=8) | st.sampled_from(["\u2028", "\N{GRINNING FACE}", "\\", '"', "]"])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def read(text: str, chunk: int) -> tuple[list[Any], str]:
    """The items, and where and how reading them ended."""
    source = JsonText(io.StringIO(text), chunk)
    items: list[Any] = []
    try:
        items += source.items()
        source.end()
    except json.JSONDecodeError as error:
        return items, source.place(error)
    return items, ""


@given(
    st.lists(values, max_size=6), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 9)
)
def test_items_are_those_of_the_standard_library(
    document: list[Any], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    text = "\n " + json.dumps(document, indent=indent, ensure_ascii=ascii_only) + "\n"
    assert read(text, chunk) == (json.loads(text), "")


@given(
    st.lists(values, min_size=1, max_size=4),
    st.sampled_from([None, 1]),
    st.integers(1, 9),
    st.data(),
)
def test_what_is_broken_is_noticed_where_the_standard_library_notices_it(
    document: list[Any], indent: int | None, chunk: int, data: st.DataObject
) -> None:
    text = json.dumps(document, indent=indent)
    place = data.draw(st.integers(1, len(text)))
    text = text[:place] + data.draw(st.sampled_from(["", "}", "\x01", "1"])) + text[place:]
    text = text[: data.draw(st.integers(1, len(text)))]
    items, wrong = read(text, chunk)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        assert wrong.split(":")[0] == str(error.lineno)
    else:
        assert (items, wrong) == (whole, "")


def recordings(path: Path) -> list[str]:
    return [one.recording_id for one in read_recordings(path)]


@pytest.mark.parametrize("indent", [None, 0, 1])
def test_a_large_list_is_not_read_whole(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "large.json"
    said = [{"role": "user", "content": "x" * 200_000}, HELLO[1]]
    path.write_text(
        json.dumps([{"id": str(n), "messages": said} for n in range(60)], indent=indent)
    )
    assert path.stat().st_size > 12e6
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_recordings(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 60
    assert peak < 8e6, "a few chunks of a megabyte and an item"


def test_lists_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    records = [json.dumps({"id": str(number), "messages": HELLO}) for number in range(3)]
    # An object a line, in a list: the last line alone looks like JSONL.
    path.write_text("[\n" + ",\n".join(records) + "\n]\n")
    assert recordings(path) == ["0", "1", "2"]
    path.write_text(json.dumps(HELLO) + "\n\n" + json.dumps(HELLO) + "\n")
    assert recordings(path) == ["x-1", "x-3"]
    path.write_text(json.dumps(HELLO, indent=1))
    assert recordings(path) == ["x"]
    skipped: list[str] = []
    path.write_text("[{\n" + json.dumps(HELLO) + "\n" + json.dumps(HELLO))
    read_again = list(read_recordings(path, skip_bad=True, on_skip=skipped.append))
    assert len(read_again) == 2 and skipped[0].startswith(f"{path}:1: not valid JSON")


def test_a_list_that_breaks_off_is_named_by_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    good = json.dumps({"messages": HELLO})
    for text, said in (
        (f"[\n{good},\n{good[:-3]}", r"x\.json:3:"),
        (f"[\n{good},\n  oops]", r"x\.json:3:3: not valid JSON"),
        (f"[{good}]\n{good}", r"x\.json:2:1: not valid JSON \(Extra data\)"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            recordings(path)
