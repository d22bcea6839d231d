"""JSON on disk."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import (
    canonical,
    content_hash,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["C"]))
)


@given(st.dictionaries(st.text(max_size=4), SCALARS))
def test_a_hash_depends_on_content_not_on_order(value: dict[str, Any]) -> None:
    turned = dict(reversed(value.items()))
    assert canonical(turned) == canonical(value)
    assert content_hash(turned) == content_hash(value)
    assert content_hash({**value, "another key": 1}) != content_hash(value)


def test_bytes_are_hashed_as_they_are() -> None:
    assert content_hash(b"").startswith("e3b0c44298fc1c14")
    assert content_hash(b"1") != content_hash("1")


def test_documents_survive_the_disk(tmp_path: Path) -> None:
    rows = [{"a": "é\u2028"}, [1, None], "x"]
    write_json(tmp_path / "new" / "a.json", rows)
    write_jsonl(tmp_path / "a.jsonl", rows[1:])
    assert read_json(tmp_path / "new" / "a.json") == rows
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [(1, [1, None]), (2, "x")]


def test_any_text_survives_as_a_line(tmp_path: Path) -> None:
    rows = ["é\u2028\x85\x0b", {"a": "\n\r"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert [row for _, row in read_jsonl(tmp_path / "a.jsonl")] == rows


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1\n\n  \n2\n")
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [(1, 1), (4, 2)]


def test_errors_name_the_place(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    with pytest.raises(UserError, match=r"bad: no such file; check the path\.$"):
        read_json(path)
    with pytest.raises(UserError, match=r"bad: no such file"):
        list(read_jsonl(path))
    path.write_text('{\n "a": }')
    with pytest.raises(UserError, match=r"bad:2:7: not valid JSON"):
        read_json(path)
    path.write_text("1\n{\n")
    with pytest.raises(UserError, match=r"bad:2: not valid JSON"):
        list(read_jsonl(path))
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        read_json(path)


def test_a_write_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "long old content")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a: cannot be written \(.*\); free space"):
        write_text(tmp_path / "file" / "a", "text")
