"""What all tests share."""

import os
from pathlib import Path

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
