"""Stopping when asked: SIGTERM, which a machine that is taken away sends some seconds before.

The signal is only noted; training asks at the end of each step, when its state can be saved.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from klong_jax.parallel.distributed import any_process


class Preemption:
    """Whether this process was asked to stop, and whether all have agreed to."""

    def __init__(self) -> None:
        self.noted = False
        self.agreed = False

    def asked(self) -> bool:
        """Whether any process was asked to stop; all call it after the same step.

        They tell each other in a collective, as they do in the step before it: one that takes part
        in the step takes part in this, so it waits for nobody that training does not wait for.
        """
        self.agreed = any_process(self.noted)
        return self.agreed


@contextmanager
def noticing_preemption() -> Iterator[Preemption]:
    """Notes SIGTERM instead of ending the process; one that nobody took up is sent again after."""
    preemption = Preemption()

    def note(number: int, frame: object) -> None:
        preemption.noted = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield preemption
    finally:
        # A handler that is not Python's own cannot be put back.
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if preemption.noted and not preemption.agreed:
        signal.raise_signal(signal.SIGTERM)
