"""The Docker daemon of this host, with its errors as this package's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import requests
from docker.client import DockerClient
from docker.errors import APIError, DockerException

from sandbox.errors import SandboxError, SandboxUnavailable


@contextmanager
def connected(silence_s: int = 60) -> Iterator[DockerClient]:
    """The daemon.

    Args:
        silence_s: Seconds that it may say nothing.

    Raises:
        SandboxUnavailable: none answers.
    """
    with answering():
        client = DockerClient.from_env(timeout=silence_s)
        client.ping()
    try:
        yield client
    finally:
        client.close()


@contextmanager
def answering() -> Iterator[None]:
    """What the daemon refuses inside is raised as a sentence."""
    try:
        yield
    except APIError as error:
        said = str(error.explanation or error)
        if "no space left" in said.lower():
            said = "the disk is full; klong sandbox image prune may free some"
        raise SandboxError(f"Docker answers: {said.rstrip('.')}.") from error
    except (DockerException, requests.RequestException) as error:
        raise SandboxUnavailable(
            f"no Docker daemon answers, and images are Docker's; start it. ({error})"
        ) from None
