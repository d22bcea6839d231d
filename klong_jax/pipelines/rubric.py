"""`klong rubric`: what rubrics ask for, and their scores where they are graded."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import Json, read_json, write_json
from klong_jax.core.rubric import (
    CATEGORIES,
    RubricNode,
    category_shares,
    parse_rubric,
    stored_score,
)
from klong_jax.pipelines.config.commands import RubricConfig

# PaperBench's grade.json holds the graded tree under this name.
_GRADED = "graded_task_tree"


@dataclass(frozen=True)
class RubricSummary:
    """One rubric in numbers.

    Attributes:
        path: The file.
        leaves: Requirements that are graded.
        depth: Nodes on the longest path from the root to a leaf.
        shares: Category to its share of the score.
        score: The score, if every leaf is graded.
    """

    path: str
    leaves: int
    depth: int
    shares: dict[str, float]
    score: float | None


def run(settings: RubricConfig) -> None:
    """Prints a table of the rubrics found, and writes it as JSON if asked to."""
    found = [_summarise(path, root) for path, root in find_rubrics(settings.path)]
    Console().print(_table(found, settings.path))
    if settings.output is not None:
        write_json(settings.output, [asdict(summary) for summary in found])


def find_rubrics(path: Path) -> Iterator[tuple[Path, RubricNode]]:
    """The rubric of a file, or every rubric and graded rubric below a folder.

    Raises:
        UserError: There is none, or one is broken; the message names file and place.
    """
    if not path.is_dir():
        yield path, parse_rubric(_tree(read_json(path)), str(path))
        return
    nothing = True
    for file in sorted(path.rglob("*.json")):
        document = read_json(file)
        # Other JSON lives in task folders; rubric.json must be a rubric.
        if file.name == "rubric.json" or _is_tree(document):
            nothing = False
            yield file, parse_rubric(_tree(document), str(file))
    if nothing:
        raise UserError(f"{path}: holds no rubric.json; give a rubric or a folder of rubrics.")


def _is_tree(document: Json) -> bool:
    tree = _tree(document)
    return isinstance(tree, dict) and {"requirements", "weight", "sub_tasks"} <= tree.keys()


def _tree(document: Json) -> Json:
    if isinstance(document, dict) and _GRADED in document:
        return document[_GRADED]
    return document


def _summarise(path: Path, root: RubricNode) -> RubricSummary:
    return RubricSummary(
        path=str(path),
        leaves=sum(1 for _ in root.leaves()),
        depth=root.depth,
        shares=category_shares(root),
        score=stored_score(root),
    )


def _table(found: list[RubricSummary], below: Path) -> Table:
    others = sorted({name for one in found for name in one.shares} - set(CATEGORIES))
    table = Table(title=Text(str(below)), title_justify="left")
    # A path is for copying: folded rather than shortened.
    table.add_column("rubric", overflow="fold")
    for heading in ("leaves", "depth", *CATEGORIES, *others, "score"):
        table.add_column(heading, justify="right", overflow="fold")
    for one in found:
        shares = [f"{one.shares.get(name, 0.0):.1%}" for name in (*CATEGORIES, *others)]
        score = "not graded" if one.score is None else f"{one.score:.4f}"
        name = str(Path(one.path).relative_to(below)) if below.is_dir() else below.name
        cells = [name, str(one.leaves), str(one.depth), *shares, score]
        # Text, because a path may look like console markup.
        table.add_row(*(Text(cell) for cell in cells))
    return table
