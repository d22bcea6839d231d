"""Tasks on disk."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.core.rubric import load_rubric, parse_rubric
from klong_jax.core.task import Task
from klong_jax.text.tasks import (
    DEFAULT_INSTRUCTIONS,
    load_task,
    load_tasks,
    save_task,
    split_sections,
)

REPOSITORY = Path(__file__).parents[2]
PAPERBENCH = (
    Path(os.environ.get("KLONG_SHARED", REPOSITORY / ".." / "shared")) / "data" / "paperbench"
)
LEAF = {
    "id": "leaf",
    "requirements": "holds",
    "weight": 1,
    "sub_tasks": [],
    "task_category": "Code Development",
}


def task_of(root: Path, **fields: Any) -> Task:
    task = Task(
        task_id="t-1",
        title='Quotes " and: colons',
        instructions="Do it.\nTwice: # not once",
        paper=("Title\n\nText.", "2 Method\nx = 1"),
        addendum="More.\n",
        blacklist=("https://example.org/code", "example.org/data"),
        rubric=parse_rubric(LEAF, "test"),
        root=root,
        workspace={"run.sh": "echo hi\n", "sub/data.txt": "1\r\n2"},
        finish_check="test -e done",
        image="python:3.12",
    )
    return replace(task, **fields)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_task(task_of(tmp_path / "t"), tmp_path / "t")
    return tmp_path / "t"


def test_a_task_survives_the_disk(saved: Path) -> None:
    assert load_task(saved) == task_of(saved)


def test_a_task_of_paperbenchs_own_fields_survives(tmp_path: Path) -> None:
    plain = task_of(tmp_path, addendum="", blacklist=(), workspace={}, finish_check="", image=None)
    save_task(plain, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "paper.md",
        "rubric.json",
    ]
    assert load_task(tmp_path) == plain


def test_instructions_default(saved: Path) -> None:
    (saved / "config.yaml").write_text("id: t\n")
    task = load_task(saved)
    assert (task.title, task.instructions) == ("t", DEFAULT_INSTRUCTIONS)


def test_none_forbids_nothing(saved: Path) -> None:
    (saved / "blacklist.txt").write_text("none\n\n")
    assert load_task(saved).blacklist == ()


def test_sections_open_at_top_headings_only() -> None:
    paper = "Front\n\n# One\n## Sub\ntext\n```sh\n# comment\n```\n\n#hash\n# Two\n\n"
    assert split_sections(paper) == (
        "Front",
        "One\n## Sub\ntext\n```sh\n# comment\n```\n\n#hash",
        "Two",
    )
    assert split_sections("no heading\n\nat all\n") == ("no heading\n\nat all",)
    assert split_sections(" \n\n") == ()


@given(st.lists(st.from_regex(r"[A-Z][a-z]{0,5}(\n[a-z# `]{0,8}[a-z])?", fullmatch=True)))
def test_sections_come_back_as_written(sections: list[str]) -> None:
    plain = [text for text in sections if "\n# " not in text and "```" not in text]
    assert split_sections("\n\n".join(f"# {text}" for text in plain)) == tuple(plain)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("paper.md", None, "task without paper; add paper.md"),
        ("paper.md", b" \n", "the paper is empty"),
        ("paper.md", b"\xff\xfe", "not UTF-8 text"),
        ("rubric.json", None, "task without rubric; add rubric.json"),
        ("rubric.json", b"{", "not valid JSON"),
        ("config.yaml", None, "config.yaml: no such file"),
        ("config.yaml", b"title: no id\n", "has no field 'id'"),
        ("config.yaml", b"- id\n", "has no field 'id'"),
        ("config.yaml", b"id: 7\n", "id must be text"),
        ("config.yaml", b"id: t\nimage: 3.12\n", "image must be text"),
        ("config.yaml", b"id: t\n bad: [\n", r"config\.yaml:2:5: not valid YAML"),
        ("workspace/data.bin", b"\xff\x00", r"data\.bin: not UTF-8 text"),
    ],
)
def test_errors_name_the_file(
    saved: Path, name: str, content: bytes | None, complaint: str
) -> None:
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        load_task(saved)
    assert str(saved) in str(caught.value)


def test_a_directory_of_tasks(tmp_path: Path) -> None:
    for name in ("b", "a", "_notes", ".cache"):
        save_task(task_of(tmp_path / name, task_id=name), tmp_path / name)
    (tmp_path / "README.md").write_text("not a task")
    assert [task.task_id for task in load_tasks(tmp_path)] == ["a", "b"]


def test_bad_directories_of_tasks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no task directory"):
        load_tasks(tmp_path)
    with pytest.raises(UserError, match="no such directory of tasks"):
        load_tasks(tmp_path / "absent")
    with pytest.raises(UserError, match="no such task directory"):
        load_task(tmp_path / "absent")
    for name in ("a", "b"):
        save_task(task_of(tmp_path / name), tmp_path / name)
    with pytest.raises(UserError, match=r"id 't-1' is also that of .*a; give one"):
        load_tasks(tmp_path)


@pytest.mark.parametrize(
    "directory",
    sorted(path.parent for path in PAPERBENCH.glob("[!_]*/config.yaml")),
    ids=lambda path: path.name,
)
def test_paperbench_tasks_lack_only_their_papers(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task without paper; add paper\.md"):
        load_task(directory)
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "paper.md").write_text("# Found\ntext")
    task = load_task(tmp_path)
    assert task.task_id == yaml.safe_load((directory / "config.yaml").read_text())["id"]
    assert task.rubric == load_rubric(directory / "rubric.json")
    assert all(line != "none" for line in task.blacklist)
