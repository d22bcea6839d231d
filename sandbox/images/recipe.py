"""What images are made of: the lists and Dockerfiles of this package, and what names them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from sandbox.errors import SandboxRefused

SLIM = "klong/base:bookworm"
"""What the docker backend takes by default."""
RESEARCH = "klong/research:bookworm"
LAYER = "klong/layer"
"""Repository of what single tasks add; its tags tell the contents."""

DEBIAN = "debian:bookworm-slim"
"""What a registry gives to start from."""

# What a task's layer may be told by.
_LISTS = ("requirements.txt", "debian.txt", "probes.txt")
_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;#]+)")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?(=\S+)?")
# The heading in research/requirements.txt below which nobody asked for a package by name.
_NEEDED = "# What these need"


def read(name: str) -> str:
    """The text of a file of this package, such as "research/debian.txt"."""
    return (resources.files("sandbox.images") / name).read_text()


def lines(text: str) -> list[str]:
    """The lines of a list, without comments and empty ones."""
    stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return [line for line in stripped if line]


def canonical(name: str) -> str:
    """A Python package's name as the index has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """The pinned packages of a list of requirements: name to version."""
    found = (_PIN.match(line) for line in lines(text))
    return {canonical(one[1]): one[2] for one in found if one is not None}


def asked(text: str) -> set[str]:
    """The packages of the research list that are there for their own sake."""
    return set(pins(text.partition(_NEEDED)[0]))


def leave_out(text: str, names: tuple[str, ...]) -> str:
    """A list without some of its packages.

    Raises:
        SandboxRefused: one is not in the list.
    """
    unwanted = {canonical(name) for name in names}
    if missing := unwanted - pins(text).keys():
        raise SandboxRefused(f"without: {', '.join(sorted(missing))} is not in the list.")
    kept = []
    for line in text.splitlines():
        pin = _PIN.match(line)
        if pin is None or canonical(pin[1]) not in unwanted:
            kept.append(line)
    return "\n".join(kept) + "\n"


def digest(base: str, files: Mapping[str, str]) -> str:
    """What tells a recipe from another: the image below, and each file."""
    whole = hashlib.sha256(base.encode())
    for name, text in sorted(files.items()):
        whole.update(f"\0{name}\0{text}".encode())
    return whole.hexdigest()[:16]


def files(kind: str) -> dict[str, str]:
    """The lists and scripts of a kind of image, by name; a layer has only its Dockerfile."""
    directory = resources.files("sandbox.images") / kind
    return {file.name: file.read_text() for file in directory.iterdir()}


def task_files(directory: Path | None, requirements: Path | None) -> tuple[str, dict[str, str]]:
    """What a task needs, as files of its layer's recipe.

    Args:
        directory: The task's. It may have requirements.txt for pip, debian.txt for apt, and
            probes.txt with what must work then.
        requirements: A list for pip alone, in place of the directory.

    Returns:
        The name of the task, and its lists.

    Raises:
        SandboxRefused: there is none, or a line that a list cannot have.
    """
    if directory is not None:
        name = directory.resolve().name
        paths = {place: directory / place for place in _LISTS if (directory / place).is_file()}
        if not paths.keys() - {"probes.txt"}:
            raise SandboxRefused(f"task: {directory} has no requirements.txt and no debian.txt.")
    elif requirements is not None:
        name, paths = requirements.resolve().stem, {"requirements.txt": requirements}
    else:
        raise SandboxRefused("name what the layer is to have: task=DIRECTORY or requirements=FILE.")
    texts = dict.fromkeys(_LISTS, "")
    for place, path in paths.items():
        try:
            texts[place] = "".join(f"{line}\n" for line in lines(path.read_text()))
        except (OSError, UnicodeDecodeError) as error:
            raise SandboxRefused(f"{path} cannot be read: {error}.") from None
    for line in lines(texts["requirements.txt"]):
        if line.startswith(("-", ".", "/")) or line.endswith("\\"):
            raise SandboxRefused(
                f"requirements.txt: {line!r} is no package by name; options of pip and files of "
                "this host do not reach the build. Where pip looks is said by pip's own "
                "variables, such as PIP_FIND_LINKS."
            )
    for line in lines(texts["debian.txt"]):
        if not _PACKAGE.fullmatch(line):
            raise SandboxRefused(f"debian.txt: {line!r} is no Debian package's name.")
    if not texts["requirements.txt"] and not texts["debian.txt"]:
        raise SandboxRefused(f"{', '.join(map(str, paths.values()))}: no package is named there.")
    return name, texts
