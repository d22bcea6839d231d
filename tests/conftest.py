"""What all tests share."""

import gc
import os
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes depends on the machine, and is nothing a test may fail by.
settings.register_profile("klong", deadline=None)
settings.load_profile("klong")

# libtpu, with which tests compile for chips that are not here, would look for them and complain.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Half of the time of most tests of numbers is LLVM's; what they assert holds without its passes.
# The recipe in full size runs as users run it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# What JAX, Torch and transformers have made lives as long as the process; walking it again and
# again in search of garbage takes up to a fifth of the time of a test that compiles.
gc.set_threshold(100_000, 20, 20)

_MEASURED = "measured"
_LONGEST = "test_recipe.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first: begun last, it would be waited for alone."""
    items.sort(key=lambda item: item.path.name != _LONGEST)


@pytest.fixture
def measured(record_property: Callable[[str, str], None]) -> Callable[[str], None]:
    """Notes a line of what was measured; the lines stand in tables at the end of the run."""
    return partial(record_property, _MEASURED)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what was measured, file by file, whichever process ran the tests."""
    tables: defaultdict[str, list[str]] = defaultdict(list)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                noted = [str(line) for name, line in report.user_properties if name == _MEASURED]
                tables[report.nodeid.partition("::")[0]] += noted
    for file, lines in tables.items():
        if lines:
            terminalreporter.section(f"measured by {file}")
            terminalreporter.write("\n".join(lines) + "\n")
