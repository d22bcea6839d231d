"""How long-horizon an attempt at a task was."""

from enum import StrEnum


class Regime(StrEnum):
    """The paper's three regimes of difficulty."""

    ORDINARY = "ordinary"
    LONG = "long-horizon"
    EXTREME = "extremely long-horizon"


def classify(
    context_ratio: float, active_s: float, *, extreme_s: float, overflow_ratio: float = 1.0
) -> Regime:
    """The regime of one attempt.

    Ordinary interactions fit into the context. Long-horizon ones overflow it, so that the agent
    forgets and goes on. Extremely long-horizon ones overflow it and run long as well.

    Args:
        context_ratio: Tokens of the whole interaction over the context limit.
        active_s: Active seconds (see `klong_jax.core.clock`).
        extreme_s: Active seconds above which an overflowing attempt is extremely long-horizon.
        overflow_ratio: Context ratio above which an attempt overflows.
    """
    if context_ratio <= overflow_ratio:
        return Regime.ORDINARY
    return Regime.EXTREME if active_s > extreme_s else Regime.LONG
