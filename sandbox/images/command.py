"""`klong sandbox image` and `python -m sandbox image`: build, list, prune, check."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox.errors import SandboxRefused
from sandbox.images import build, check, stock
from sandbox.images.daemon import connected
from sandbox.table import print_table, span

# A step of a build may be silent for long: a large download, a compilation.
_SILENCE_S = 1800
# Of a line of the progress; a step is as long as its script.
_WIDTH = 100

USAGE = "image build [slim | research | layer] | image list | image prune | image check NAME"


@dataclass(frozen=True)
class Recipe:
    """What a build is asked for.

    Attributes:
        task: Directory of a task whose layer to build.
        requirements: List of Python packages to make a layer of.
        base: The image to build on; None is the usual one.
        source: Where the slim image's Debian comes from.
        without: Packages of the research image to leave out.
        force: Whether to build what is there already.
    """

    task: Path | None = None
    requirements: Path | None = None
    base: str | None = None
    source: build.Source = "auto"
    without: tuple[str, ...] = ()
    force: bool = False


def run(words: Sequence[str], asked: Recipe) -> int:
    """Does what the first word says, to what the others name; returns the exit status.

    Raises:
        SandboxError: in one sentence, why not.
    """
    match list(words):
        case ["build", *kinds] if len(kinds) <= 1:
            _build(kinds[0] if kinds else None, asked)
        case ["list"]:
            _list()
        case ["prune"]:
            _prune()
        case ["check", name]:
            return asyncio.run(_check(name))
        case _:
            raise SandboxRefused(f"write {USAGE}.")
    return 0


def _build(kind: str | None, asked: Recipe) -> None:
    """Prints the image's name; the progress goes to standard error."""
    layer = asked.task is not None or asked.requirements is not None
    kind = kind or ("layer" if layer else "slim")
    if layer and kind != "layer":
        raise SandboxRefused(f"task, requirements: they make a layer; leave {kind} out.")
    if asked.without and kind != "research":
        raise SandboxRefused(f"without: only the research image has a list, not {kind}.")
    with connected(_SILENCE_S) as client:
        say, force = _Progress(), asked.force
        try:
            if kind == "slim":
                name = build.build_slim(client, asked.source, asked.base, say, force=force)
            elif kind == "research":
                source, without = asked.source, asked.without
                name = build.build_research(client, source, asked.base, without, say, force=force)
            elif kind == "layer":
                task, requirements = asked.task, asked.requirements
                name = build.build_layer(client, task, requirements, asked.base, say, force=force)
            else:
                raise SandboxRefused(f"there is no image {kind}; choose slim, research or layer.")
        finally:
            say.end()
    print(name)


class _Progress:
    """Lines of a build: on a terminal all, in one place; elsewhere those that are no detail."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    def __call__(self, line: str, *, detail: bool = False) -> None:
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)
        elif not detail:
            print(line[:_WIDTH], file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leaves the terminal's line."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _list() -> None:
    with connected() as client:
        found = stock.images(client)
    going = {image.id for image in stock.dispensable(found)}
    headings = ("NAME", "KIND", "FOR", "SIZE", "PACKAGES", "AGE", "CONTAINERS", "PRUNE")
    rows = [
        (
            image.called,
            image.kind,
            image.task,
            f"{image.size / 1e6:.0f} MB",
            image.packages,
            span(stock.age_s(image)),
            str(image.containers),
            "goes" if image.id in going else "stays",
        )
        for image in found
    ]
    print_table([headings, *rows])


def _prune() -> None:
    with connected() as client:
        gone, kept = stock.remove(client, stock.dispensable(stock.images(client)))
    for image in gone:
        print(f"removed {image.called} ({image.kind} {image.task}".rstrip() + ")")
    for image in kept:
        print(f"kept {image.called}: a container or another image needs it")
    if not gone:
        print("nothing to remove")


async def _check(image: str) -> int:
    rows: list[check.Checked] = []

    def tell(one: check.Checked) -> None:
        rows.append(one)
        said = one.problem or "works"
        print(
            f"{one.what:<8} {one.name:<32} {one.version:<16} {one.seconds:6.1f} s  {said}",
            flush=True,
        )

    await check.check(image, tell)
    bad = sum(bool(one.problem) for one in rows)
    packages = sum(one.what == "package" for one in rows)
    print(f"{packages} packages, {len(rows) - packages} programs: {bad or 'none'} without success")
    return 1 if bad or not rows else 0
