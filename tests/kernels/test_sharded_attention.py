"""Attention on eight simulated devices, in a process of its own."""

from collections.abc import Callable

import pytest
from kernel_helpers import on_eight_devices


@pytest.mark.slow
def test_a_mesh_does_not_change_the_result(measured: Callable[[str], None]) -> None:
    measured(on_eight_devices("sharded_attention.py"))
