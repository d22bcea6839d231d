"""Builds images: each by one Dockerfile of this package, the slim one also by debootstrap."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

from docker.client import DockerClient
from docker.errors import APIError, ImageNotFound

from sandbox.errors import SandboxError, SandboxRefused, SandboxUnavailable
from sandbox.images import index, recipe
from sandbox.images.daemon import answering

Source = Literal["auto", "registry", "debootstrap"]


class Say(Protocol):
    """Hears of the progress of a build."""

    def __call__(self, line: str, *, detail: bool = False) -> None:
        """Takes a line; a detail is one of thousands."""


KIND, RECIPE, LAYER, PACKAGES = "klong.image", "klong.recipe", "klong.layer", "klong.packages"
"""Labels: slim, research or layer; the digest of what it was made of, given by the last step of a
build, for it sorts last; a layer's task; how many Python packages were asked for."""
UNFINISHED = "unfinished"
"""What the first step of a build gives for the digest."""

_KEPT_LINES = 400
# What in the output of a build tells which of the usual troubles it is.
_TROUBLES = (
    ("No space left on device", "the disk is full; klong sandbox image prune may free some."),
    ("no matching manifest", "the base is not there for this machine's architecture."),
    ("Temporary failure resolving", "Debian's mirror cannot be reached from here."),
    ("Unable to locate package", "a Debian package is not there under that name."),
    ("CERTIFICATE_VERIFY_FAILED", "the index's certificate is not trusted; set PIP_CERT."),
    ("Failed to establish a new connection", "the index of packages cannot be reached from here."),
    ("ResolutionImpossible", "the versions asked for do not fit together."),
    ("No matching distribution found", "a Python package is not there in the version asked for."),
)


def build_slim(
    client: DockerClient, source: Source, base: str | None, say: Say, *, force: bool = False
) -> str:
    """Builds the default image of the docker backend.

    Args:
        client: The daemon.
        source: Whether its Debian comes from a registry or by debootstrap; auto asks the registry
            first.
        base: The image to start from, in place of the registry's Debian.
        say: Hears of the progress.
        force: Whether to build it also where it is there.

    Returns:
        Its name.
    """
    debian = base or recipe.DEBIAN
    with answering():
        registry = source != "debootstrap" and _have(client, debian, pull=True)
    if registry:
        return _build(client, "slim", recipe.SLIM, debian, recipe.files("slim"), {}, say, force)
    if source == "registry" or base is not None:
        raise SandboxUnavailable(
            f"the image {debian} is not here and cannot be pulled; source=debootstrap, without "
            "base, needs no registry."
        )
    _debootstrap(say, force)
    return recipe.SLIM


def build_research(
    client: DockerClient,
    source: Source,
    base: str | None,
    without: tuple[str, ...],
    say: Say,
    *,
    force: bool = False,
) -> str:
    """Builds the research image, and the slim one below it if that is not there.

    Args:
        client: The daemon.
        source: Of the slim image.
        base: The image to put it on, in place of the slim one.
        without: Packages of the list to leave out.
        say: Hears of the progress.
        force: Whether to build it also where the same is there.

    Returns:
        Its name.
    """
    files = recipe.files("research")
    files["requirements.txt"] = recipe.leave_out(files["requirements.txt"], without)
    with answering():
        slim = base is not None or _have(client, recipe.SLIM, pull=False)
    if not slim:
        build_slim(client, source, None, say)
    labels = {PACKAGES: str(len(recipe.pins(files["requirements.txt"])))}
    below = base or recipe.SLIM
    return _build(client, "research", recipe.RESEARCH, below, files, labels, say, force)


def build_layer(
    client: DockerClient,
    task: Path | None,
    requirements: Path | None,
    base: str | None,
    say: Say,
    *,
    force: bool = False,
) -> str:
    """Builds what one task needs, on top of an image; the same needs are built once.

    Args:
        client: The daemon.
        task: Directory with requirements.txt, debian.txt or both.
        requirements: A list for pip; in place of the task.
        base: The image below, in place of the research one.
        say: Hears of the progress.
        force: Whether to build it also where the same is there.

    Returns:
        Its name, which its contents tell.
    """
    name, files = recipe.task_files(task, requirements)
    files |= recipe.files("layer")
    below = base or recipe.RESEARCH
    with answering():
        tag = f"{recipe.LAYER}:{_digest(client, below, files)}"
    labels = {LAYER: name, PACKAGES: f"+{len(recipe.lines(files['requirements.txt']))}"}
    return _build(client, "layer", tag, below, files, labels, say, force)


def _have(client: DockerClient, name: str, *, pull: bool) -> bool:
    """Whether the daemon has an image, or can get it."""
    try:
        client.images.get(name)
        return True
    except ImageNotFound:
        if not pull:
            return False
    try:
        client.images.pull(name)
        return True
    except APIError:
        # Whatever the registry says, it is not to be had.
        return False


def _digest(client: DockerClient, base: str, files: Mapping[str, str]) -> str:
    """What tells an image by its recipe, and the very image below."""
    try:
        return recipe.digest(str(client.images.get(base).id), files)
    except ImageNotFound:
        raise SandboxRefused(
            f"base: the image {base} is not here; build it, or pull it first."
        ) from None


def _build(
    client: DockerClient,
    kind: str,
    tag: str,
    base: str,
    files: Mapping[str, str],
    labels: Mapping[str, str],
    say: Say,
    force: bool,
) -> str:
    """Builds by the Dockerfile of a kind; the tag is given when everything has worked."""
    with answering():
        made_of = _digest(client, base, files)
        if not force and _label(client, tag, RECIPE) == made_of:
            say(f"{tag} is there already.")
            return tag
        context = {name: text.encode() for name, text in files.items()}
        labels = {**labels, RECIPE: made_of}
        if kind == "slim":
            return _run(client, tag, context, {"BASE": base}, labels, say)
        if (trusted := index.certificates()) is not None:
            context["ca.pem"] = trusted
        if kind == "layer" and (pip := _own_pip()) is not None:
            context["pip.zip"] = pip
        with index.offered(torch=kind == "research") as arguments:
            arguments["BASE"] = base
            if trusted is not None:
                arguments["PIP_CERT"] = f"/usr/share/klong/{kind}/ca.pem"
            return _run(client, tag, context, arguments, labels, say)


def _label(client: DockerClient, name: str, label: str) -> str | None:
    try:
        told: str | None = (client.images.get(name).labels or {}).get(label)
        return told
    except ImageNotFound:
        return None


def _run(
    client: DockerClient,
    tag: str,
    context: Mapping[str, bytes],
    arguments: Mapping[str, str],
    labels: Mapping[str, str],
    say: Say,
) -> str:
    output = client.api.build(
        fileobj=_tar(context),
        custom_context=True,
        tag=tag,
        buildargs=dict(arguments),
        labels=dict(labels),
        # Neither the bridge nor its rules are there on every host; what runs are package managers.
        network_mode="host",
        rm=True,
        forcerm=True,
        decode=True,
    )
    _follow(output, say)
    return tag


def _follow(output: Iterable[Mapping[str, Any]], say: Say) -> None:
    """Tells the steps and what is fetched; a failure becomes a sentence.

    Raises:
        SandboxError: the build has failed.
    """
    said: list[str] = []
    for part in output:
        for line in _lines(str(part.get("stream") or part.get("status") or "")):
            said = [*said[-_KEPT_LINES:], line]
            say(line, detail=not line.startswith(("Step ", "Successfully tagged ")))
        if "error" in part:
            raise _failure(str(part["error"]), said)


def _lines(text: str) -> Iterator[str]:
    """The lines of a build's output, without colours."""
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        if line.strip():
            yield line.rstrip()


def _failure(error: str, said: list[str]) -> SandboxError:
    for mark, sentence in _TROUBLES:
        for line in [*said, error]:
            if mark.lower() in line.lower():
                at_fault = line.strip()[:200]
                return SandboxUnavailable(f"the image is not built: {sentence} ({at_fault})")
    tail = "\n".join(said[-12:])
    return SandboxError(f"the image is not built: {error}; before, it said:\n{tail}")


def _tar(files: Mapping[str, bytes]) -> io.BytesIO:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            # No time of change: the daemon's cache knows the same file again.
            member.size, member.mode = len(data), 0o644
            archive.addfile(member, io.BytesIO(data))
    packed.seek(0)
    return packed


def _own_pip() -> bytes | None:
    """This interpreter's pip in a zip, from which Python runs it: the slim image has none."""
    try:
        root = resources.files("pip")
    except ModuleNotFoundError:
        return None
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(Path(str(root)).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                inside = zipfile.ZipInfo(f"pip/{path.relative_to(str(root))}")
                archive.writestr(inside, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def _debootstrap(say: Say, force: bool) -> None:
    with resources.as_file(resources.files("sandbox.images") / "slim") as directory:
        run = subprocess.Popen(
            ["sh", str(directory / "debootstrap.sh"), *(["--force"] if force else [])],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "KLONG_IMAGE": recipe.SLIM},
        )
        assert run.stderr is not None
        last = ""
        with run.stderr:
            for line in run.stderr:
                last = line.strip().removeprefix("sandbox_image: ")
                say(last)
    if run.wait() != 0:
        raise SandboxUnavailable(f"the slim image is not built: {last}")
