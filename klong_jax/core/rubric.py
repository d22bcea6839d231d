"""Rubric trees in PaperBench's TaskNode schema: reading, writing, scoring, counting."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import content_hash, read_json, write_text

CATEGORIES = ("Code Development", "Code Execution", "Result Analysis")
_STRUCTURAL = ("id", "requirements", "weight", "sub_tasks")


@dataclass(frozen=True)
class RubricNode:
    """One requirement; its children refine it, a leaf is graded.

    Attributes:
        node_id: Its name; real rubrics repeat some, so `path` is what tells nodes apart.
        path: Child positions from the root, "0.3.1"; the root's is empty.
        requirements: What must hold.
        weight: Non-negative share among its siblings.
        sub_tasks: The children.
        category: A leaf's PaperBench category; None on inner nodes.
        check: A leaf's command that grades it in the sandbox; empty where a reader must judge.
        score: The grade, where the tree is a graded one.
        fields: The JSON object as read, children apart: what is saved back, field for field.
    """

    node_id: str
    path: str
    requirements: str
    weight: float
    sub_tasks: tuple["RubricNode", ...]
    category: str | None
    check: str
    score: float | None
    fields: tuple[tuple[str, Any], ...]

    @property
    def is_leaf(self) -> bool:
        """Whether nothing refines this node."""
        return not self.sub_tasks

    def leaves(self) -> Iterator["RubricNode"]:
        """The leaves, left to right."""
        if self.is_leaf:
            yield self
        for child in self.sub_tasks:
            yield from child.leaves()

    @property
    def depth(self) -> int:
        """Nodes on the longest path from here down, this one included."""
        return 1 + max((child.depth for child in self.sub_tasks), default=0)

    @cached_property
    def content_hash(self) -> str:
        """Hash of the tree's content."""
        return content_hash(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The node as read: same fields, same order."""
        return {
            key: [child.to_json() for child in self.sub_tasks] if key == "sub_tasks" else value
            for key, value in self.fields
        }

    def grade(self, grades: Callable[["RubricNode"], float]) -> float:
        """PaperBench's score: the weighted mean of the children, down to the leaves' grades.

        Args:
            grades: Gives a leaf's grade in [0, 1].

        Returns:
            The score in [0, 1]; a node whose children all weigh nothing scores zero.
        """
        if self.is_leaf:
            return grades(self)
        total = sum(child.weight for child in self.sub_tasks)
        if total == 0:
            return 0.0
        return sum(child.weight * child.grade(grades) for child in self.sub_tasks) / total


def leaf_shares(root: RubricNode) -> dict[str, float]:
    """Each leaf's share of the root's score, by leaf path; they sum to 1."""
    shares: dict[str, float] = {}

    def visit(node: RubricNode, share: float) -> None:
        if node.is_leaf:
            shares[node.path] = share
        total = sum(child.weight for child in node.sub_tasks)
        for child in node.sub_tasks:
            visit(child, share * child.weight / total if total else 0.0)

    visit(root, 1.0)
    return shares


def category_shares(root: RubricNode) -> dict[str, float]:
    """Share of the root's score that hangs on each category."""
    shares: dict[str, float] = {}
    by_leaf = leaf_shares(root)
    for leaf in root.leaves():
        category = leaf.category or "uncategorised"
        shares[category] = shares.get(category, 0.0) + by_leaf[leaf.path]
    return shares


def stored_score(root: RubricNode) -> float | None:
    """The score that follows from a graded tree's leaf scores; None if a leaf has none."""
    if any(leaf.score is None for leaf in root.leaves()):
        return None
    return root.grade(lambda leaf: leaf.score or 0.0)


def parse_rubric(value: Any, source: str) -> RubricNode:
    """Builds and validates a tree from JSON.

    Args:
        value: The decoded document.
        source: The file it came from, for messages.

    Raises:
        UserError: Something is missing or impossible; names the file and the JSON path.
    """

    def refuse(path: str, problem: str) -> UserError:
        return UserError(f"{source}: {path}: {problem}.")

    def visit(node: Any, path: str, position: str) -> RubricNode:
        if not isinstance(node, dict):
            raise refuse(path, "must be an object with id, requirements, weight and sub_tasks")
        for name in _STRUCTURAL:
            if name not in node:
                raise refuse(path, f"has no field {name!r}; add it")
        if not isinstance(node["sub_tasks"], list):
            raise refuse(f"{path}.sub_tasks", "must be a list of nodes")
        for name in ("id", "requirements"):
            if not isinstance(node[name], str):
                raise refuse(f"{path}.{name}", "must be a string")
        weight = node["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
            raise refuse(f"{path}.weight", f"must be a number of at least 0, not {weight!r}")
        category = node.get("task_category")
        if not node["sub_tasks"] and category not in CATEGORIES:
            raise refuse(
                f"{path}.task_category",
                f"a leaf needs one of {', '.join(CATEGORIES)}, not {category!r}",
            )
        score = node.get("score")
        if score is not None and not (isinstance(score, int | float) and 0 <= score <= 1):
            raise refuse(f"{path}.score", f"must be between 0 and 1, not {score!r}")
        check = node.get("check", "")
        if not isinstance(check, str):
            raise refuse(f"{path}.check", "must be a command, given as a string")
        return RubricNode(
            node_id=node["id"],
            path=position,
            requirements=node["requirements"],
            weight=weight,
            sub_tasks=tuple(
                visit(child, f"{path}.sub_tasks[{i}]", f"{position}.{i}".lstrip("."))
                for i, child in enumerate(node["sub_tasks"])
            ),
            category=category,
            check=check,
            score=score,
            fields=tuple((k, None if k == "sub_tasks" else v) for k, v in node.items()),
        )

    return visit(value, "$", "")


def load_rubric(path: Path) -> RubricNode:
    """Reads and validates rubric.json.

    Raises:
        UserError: Names the file and the JSON path of what is wrong.
    """
    return parse_rubric(read_json(path), str(path))


def save_rubric(root: RubricNode, path: Path) -> None:
    """Writes the tree as PaperBench does: four spaces, no newline at the end."""
    write_text(path, json.dumps(root.to_json(), indent=4))
