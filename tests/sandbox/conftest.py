"""Services to test against, one for every backend that the machine can have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import kubernetes_cluster
import pytest
from sandbox_helpers import OTHER_BACKEND, Service, make_backend, open_directory, require

from sandbox.service import embedded

# What it needs takes too long to build in CI.
collect_ignore = [] if kubernetes_cluster.is_available() else ["test_sandbox_kubernetes.py"]


@pytest.fixture(
    scope="session",
    params=[
        "local-bubblewrap",
        "local-plain",
        pytest.param("docker", marks=pytest.mark.docker),
        *(["other"] if OTHER_BACKEND else []),
    ],
)
def kind(request: pytest.FixtureRequest) -> str:
    require(request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def service(kind: str) -> Iterator[Service]:
    with open_directory() as state_dir:
        with embedded(make_backend(kind, state_dir)) as url:
            yield Service(kind, url, state_dir)
        left = list(state_dir.glob("*/*/sb-*"))
        assert left == [], "closing the service leaves sandboxes"


@pytest.fixture
def state_dir() -> Iterator[Path]:
    with open_directory() as path:
        yield path
