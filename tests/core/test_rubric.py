"""Rubric trees: PaperBench's own files, and what must hold of any tree."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.core.rubric import (
    CATEGORIES,
    category_shares,
    leaf_shares,
    load_rubric,
    parse_rubric,
    save_rubric,
    stored_score,
)

REPOSITORY = Path(__file__).parents[2]
PAPERBENCH = (
    Path(os.environ.get("KLONG_SHARED", REPOSITORY / ".." / "shared")) / "data" / "paperbench"
)
RUBRICS = sorted(PAPERBENCH.glob("[!_]*/rubric.json"))
GRADED = sorted(PAPERBENCH.glob("_judge_eval/*/*/grading/expected_result.json"))


def test_the_paperbench_data_is_here() -> None:
    if not RUBRICS or not GRADED:
        message = f"no PaperBench data in {PAPERBENCH}: set KLONG_SHARED"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


@pytest.mark.parametrize("path", RUBRICS, ids=lambda path: path.parent.name)
def test_paperbench_rubrics_round_trip(path: Path, tmp_path: Path) -> None:
    root = load_rubric(path)
    save_rubric(root, tmp_path / "rubric.json")
    saved = (tmp_path / "rubric.json").read_text()
    assert json.loads(saved) == json.loads(path.read_text())
    assert saved.rstrip("\n") == path.read_text().rstrip("\n")
    assert sum(leaf_shares(root).values()) == pytest.approx(1)
    assert sum(category_shares(root).values()) == pytest.approx(1)
    assert len({leaf.path for leaf in root.leaves()}) == len(list(root.leaves()))


@pytest.mark.parametrize("path", GRADED, ids=lambda path: path.parents[2].name)
def test_graded_trees_score_as_stored_at_every_node(path: Path) -> None:
    document = json.loads(path.read_text())
    root = parse_rubric(document.get("graded_task_tree", document), str(path))
    pending, inner = [root], 0
    while pending:
        node = pending.pop()
        assert stored_score(node) == pytest.approx(node.score, abs=1e-12)
        inner += not node.is_leaf
        pending += node.sub_tasks
    assert inner > 1


def node(weight: float = 1, *sub_tasks: Any, **fields: Any) -> dict[str, Any]:
    category = {} if sub_tasks else {"task_category": CATEGORIES[0]}
    basics = {"id": "n", "requirements": "r", "weight": weight, "sub_tasks": list(sub_tasks)}
    return {**basics, **category, **fields}


def trees() -> st.SearchStrategy[dict[str, Any]]:
    weights = st.integers(1, 9)
    leaves = st.builds(
        node,
        weights,
        task_category=st.sampled_from(CATEGORIES),
        score=st.integers(0, 1),
        extra=st.text(max_size=3),
    )
    return st.recursive(
        leaves,
        lambda below: st.builds(
            lambda weight, children: node(weight, *children),
            weights,
            st.lists(below, min_size=1, max_size=4),
        ),
        max_leaves=12,
    )


@given(trees())
def test_any_tree_round_trips_and_its_score_is_the_shares_of_what_holds(
    tree: dict[str, Any],
) -> None:
    root = parse_rubric(tree, "test")
    assert root.to_json() == tree
    assert list(root.to_json()) == list(tree)
    assert root.content_hash == parse_rubric(json.loads(json.dumps(tree)), "again").content_hash
    shares = leaf_shares(root)
    assert sum(shares.values()) == pytest.approx(1)
    held = sum(shares[leaf.path] * (leaf.score or 0) for leaf in root.leaves())
    assert stored_score(root) == pytest.approx(held)
    assert root.grade(lambda leaf: 1.0) == 1.0
    assert root.grade(lambda leaf: 0.0) == 0.0


def test_paths_lead_from_the_root() -> None:
    root = parse_rubric(node(1, node(), node(1, node(), node(3, id="here"))), "test")
    assert [leaf.path for leaf in root.leaves()] == ["0", "1.0", "1.1"]
    assert root.sub_tasks[1].sub_tasks[1].node_id == "here"
    assert root.depth == 3
    assert leaf_shares(root)["1.1"] == pytest.approx(0.5 * 0.75)


def test_weights_of_zero_are_zero_not_a_division() -> None:
    root = parse_rubric(node(1, node(0), node(0)), "test")
    assert root.grade(lambda leaf: 1.0) == 0.0
    assert set(leaf_shares(root).values()) == {0.0}


def test_a_tree_without_scores_has_none() -> None:
    assert stored_score(parse_rubric(node(1, node(score=1), node()), "test")) is None


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ([], r"\$: must be an object"),
        ({"id": "n"}, r"\$: has no field 'requirements'"),
        (node(1, {"id": "n"}), r"\$\.sub_tasks\[0\]: has no field 'requirements'"),
        (node(1, node(-1)), r"\$\.sub_tasks\[0\]\.weight: must be a number of at least 0, not -1"),
        (node(float("nan")), r"\$\.weight"),
        (node(weight=True), r"\$\.weight"),
        (node(id=3), r"\$\.id: must be a string"),
        (node(sub_tasks={}), r"\$\.sub_tasks: must be a list"),
        (node(task_category="Fun"), r"\$\.task_category: a leaf needs one of .*, not 'Fun'"),
        (node(score=2), r"\$\.score: must be between 0 and 1, not 2"),
        (node(check=["ls"]), r"\$\.check: must be a command"),
    ],
)
def test_errors_name_file_and_place(tree: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"^rubric\.json: {complaint}.*\.$"):
        parse_rubric(tree, "rubric.json")
