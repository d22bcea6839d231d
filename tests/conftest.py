"""What all tests share."""

from hypothesis import settings

# How long an example takes depends on the machine, and is nothing a test may fail by.
settings.register_profile("klong", deadline=None)
settings.load_profile("klong")
