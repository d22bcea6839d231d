"""Fixtures of the scaffold's tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.service import embedded

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    with embedded("local") as url:
        yield url
