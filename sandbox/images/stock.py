"""The images of this package that the daemon has: which, how large, used by whom; pruning."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from docker.client import DockerClient
from docker.errors import APIError, ImageNotFound

from sandbox.images import recipe
from sandbox.images.build import KIND, LAYER, PACKAGES, RECIPE, UNFINISHED
from sandbox.images.daemon import answering

_CONFLICT = 409
_REPOSITORIES = {name.partition(":")[0] for name in (recipe.SLIM, recipe.RESEARCH, recipe.LAYER)}


@dataclass(frozen=True)
class Image:
    """One image of the daemon.

    Attributes:
        id: Its digest.
        names: What it is called; empty for what a build that failed, or a newer one, has left.
        kind: "slim", "research" or "layer".
        task: The task that a layer is for.
        size: Bytes, those of the images below included.
        packages: How many Python packages were asked for; a layer's begin with "+".
        created: Unix seconds.
        containers: Containers made of it, running or not.
        ours: Whether a build of this package made it, as far as its labels tell.
    """

    id: str
    names: tuple[str, ...]
    kind: str
    task: str
    size: int
    packages: str
    created: int
    containers: int
    ours: bool

    @property
    def called(self) -> str:
        """Its first name, or its digest's beginning."""
        return self.names[0] if self.names else self.id.removeprefix("sha256:")[:12]


def images(client: DockerClient) -> list[Image]:
    """The images of this package, the newest first."""
    with answering():
        used = Counter(one["ImageID"] for one in client.api.containers(all=True))
        found = []
        for told in client.api.images():
            labels = told["Labels"] or {}
            names = tuple(name for name in told["RepoTags"] or () if name != "<none>:<none>")
            ours = KIND in labels and _is_ours(client, told["Id"], names, labels)
            if not ours and recipe.SLIM not in names:
                continue
            found.append(
                Image(
                    id=told["Id"],
                    names=names,
                    kind=labels.get(KIND, "slim"),
                    task=labels.get(LAYER, ""),
                    size=told["Size"],
                    packages=labels.get(PACKAGES, "0"),
                    created=told["Created"],
                    containers=used[told["Id"]],
                    ours=ours,
                )
            )
    return sorted(found, key=lambda image: -image.created)


def _is_ours(
    client: DockerClient, image: str, names: tuple[str, ...], labels: Mapping[str, str]
) -> bool:
    """Whether a build of this package made an image that has its labels.

    What others build on ours has the labels, too. Theirs have other names; without a name, the
    last step of a build of ours gave the label, or it never came to that step.
    """
    if names:
        return all(name.rpartition(":")[0] in _REPOSITORIES for name in names)
    made_of = labels.get(RECIPE, UNFINISHED)
    history: list[dict[str, str]] = client.images.get(image).history()
    # An image that was imported has no step.
    last = made_of == UNFINISHED or f"{RECIPE}={made_of}" in history[0]["CreatedBy"]
    return last or len(history) == 1


def dispensable(stock: Iterable[Image]) -> list[Image]:
    """Those that can go: ours, of no container, and not the newest of their kind or task.

    What has no name is never the newest: a build has failed, or a later one has taken its name.
    """
    kept: set[tuple[str, str]] = set()
    going = []
    for image in sorted(stock, key=lambda image: -image.created):
        kind = (image.kind, image.task)
        newest = bool(image.names) and kind not in kept
        if newest:
            kept.add(kind)
        elif image.ours and image.containers == 0:
            going.append(image)
    return going


def remove(client: DockerClient, going: Iterable[Image]) -> tuple[list[Image], list[Image]]:
    """Removes images, though none that is in use.

    Returns:
        What went, and what the daemon keeps since other images stand on it or a container came.
    """
    gone, kept = [], []
    for image in going:
        try:
            with answering():
                # By names, lest others that somebody gave it go with them.
                for name in image.names or (image.id,):
                    _remove(client, name)
            gone.append(image)
        except _InUse:
            kept.append(image)
    return gone, kept


class _InUse(Exception):
    """The daemon keeps an image."""


def _remove(client: DockerClient, name: str) -> None:
    try:
        client.api.remove_image(name)
    except ImageNotFound:
        # Gone meanwhile.
        pass
    except APIError as error:
        if error.status_code == _CONFLICT:
            raise _InUse from None
        raise


def age_s(image: Image) -> float:
    """Seconds since it was made."""
    return max(0.0, time.time() - image.created)
