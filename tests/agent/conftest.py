"""Fixtures of the scaffold's tests."""

from collections.abc import Iterator

import pytest

from sandbox.service import embedded


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    with embedded("local") as url:
        yield url
