"""What a person sees of a stage: a progress bar while it runs, one line when it is done."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Advance(Protocol):
    """Tells the bar how much was done, and a short remark to show beside it."""

    def __call__(self, amount: int, remark: str = "") -> None:
        """Moves the bar; an empty remark leaves the last one."""
        ...


@contextmanager
def stage(console: Console, title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Shows progress through `total` parts; leaves one line with the time it took.

    Args:
        console: Where.
        title: What is done.
        total: How many parts there are.
        done: How many were done before, and say nothing of how long the others take.
    """
    started = time.monotonic()
    bar = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
        console=console,
        transient=True,
    )
    said = ""
    with bar:
        task = bar.add_task(title, total=total, completed=done, remark="")

        def advance(amount: int, remark: str = "") -> None:
            nonlocal said
            said = remark or said
            bar.update(task, advance=amount, remark=said)

        yield advance
    console.print(f"{title:<24} {time.monotonic() - started:6.1f} s  {said}", markup=False)
