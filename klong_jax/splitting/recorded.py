"""What is left open when a recording is split; nothing of it is left open to an agent that acts."""

from dataclasses import dataclass

from klong_jax.splitting.pinning import OPENING, Pin


@dataclass(frozen=True)
class SplitOptions:
    """How recordings are split, beside the context policy.

    Attributes:
        pin: What every window keeps, where the data does not say.
    """

    pin: Pin = OPENING


DEFAULT_OPTIONS = SplitOptions()
