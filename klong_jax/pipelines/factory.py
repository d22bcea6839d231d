"""`klong factory`: generated Replicate tasks in PaperBench's layout."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from klong_jax.core.task import Task
from klong_jax.factory.replicate import make_task
from klong_jax.pipelines.config.commands import FactoryConfig


def run(config: FactoryConfig) -> None:
    """Writes the tasks and says where."""
    tasks = write_tasks(config.output, "factory", config.seed, config.components, config.count)
    Console().print(f"{len(tasks)} tasks in {config.output}", markup=False)


def write_tasks(
    root: Path, split: str, seed: int, components: Sequence[int], count: int
) -> list[Task]:
    """Writes `count` tasks whose sizes are taken in turn; splits never share a paper's seed."""
    first = seed * 1_000_000 + _SPLITS[split] * 100_000
    return [
        make_task(first + index, components[index % len(components)], root)
        for index in range(count)
    ]


_SPLITS = {"factory": 0, "demonstrated": 1, "long": 2, "practised": 3, "heldout": 4}
