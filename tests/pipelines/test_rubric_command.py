"""`klong rubric` on made and on real rubrics."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import read_json
from klong_jax.pipelines import rubric
from klong_jax.pipelines.config.commands import RubricConfig

SHARED = Path(os.environ.get("KLONG_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def leaf(category: str, weight: float = 1, score: float | None = None) -> dict[str, Any]:
    node: dict[str, Any] = {
        "id": category,
        "requirements": "r",
        "weight": weight,
        "sub_tasks": [],
        "task_category": category,
    }
    return node if score is None else {**node, "score": score}


def tree(*children: dict[str, Any]) -> dict[str, Any]:
    return {"id": "root", "requirements": "r", "weight": 1, "sub_tasks": list(children)}


def summaries(path: Path, tmp_path: Path) -> list[dict[str, Any]]:
    output = tmp_path / "out" / "numbers.json"
    rubric.run(RubricConfig(path=path, output=output))
    rows: list[dict[str, Any]] = read_json(output)
    return rows


def test_numbers_of_a_graded_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "graded.json"
    graded = tree(
        leaf("Code Development", weight=3, score=1.0),
        tree(leaf("Code Execution", score=0.0), leaf("Result Analysis", score=1.0)),
    )
    path.write_text(json.dumps({"paper_id": "p", "graded_task_tree": graded}))
    (row,) = summaries(path, tmp_path)
    assert row == {
        "path": str(path),
        "leaves": 3,
        "depth": 3,
        "shares": {"Code Development": 0.75, "Code Execution": 0.125, "Result Analysis": 0.125},
        "score": 0.875,
    }
    assert "0.8750" in capsys.readouterr().out


def test_a_folder_is_searched(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    for name in ("b/rubric.json", "a/deep/rubric.json"):
        (tasks / name).parent.mkdir(parents=True)
        (tasks / name).write_text(json.dumps(leaf("Code Execution")))
    (tasks / "b" / "unrelated.json").write_text('{"messages": []}')
    rows = summaries(tasks, tmp_path)
    assert [row["path"] for row in rows] == [
        str(tasks / "a/deep/rubric.json"),
        str(tasks / "b/rubric.json"),
    ]
    assert [row["score"] for row in rows] == [None, None]


def test_a_broken_rubric_is_named(tmp_path: Path) -> None:
    (tmp_path / "rubric.json").write_text('{"id": "x"}')
    with pytest.raises(UserError, match=r"rubric\.json: \$: has no field 'requirements'"):
        rubric.run(RubricConfig(path=tmp_path, output=None))
    (tmp_path / "rubric.json").rename(tmp_path / "other.json")
    with pytest.raises(UserError, match="holds no rubric"):
        rubric.run(RubricConfig(path=tmp_path, output=None))


def test_every_paperbench_rubric(tmp_path: Path) -> None:
    papers = SHARED / "data" / "paperbench"
    if not papers.is_dir():
        refuse = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        refuse(f"no PaperBench data at {papers}: set KLONG_SHARED")
    rows = summaries(papers, tmp_path)
    assert len([row for row in rows if row["path"].endswith("/rubric.json")]) >= 10
    for row in rows:
        assert sum(row["shares"].values()) == pytest.approx(1.0)
        assert row["leaves"] >= 1
