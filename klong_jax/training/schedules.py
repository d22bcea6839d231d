"""How the learning rate goes: up to its peak, and down to a tenth of it by the last step."""

from typing import Literal

import optax

Schedule = Literal["cosine", "constant", "linear", "wsd"]

_END = 0.1  # of the peak


def make_schedule(
    kind: Schedule, peak: float, warmup: int, total: int, decay_share: float
) -> optax.Schedule:
    """The rate at each step, counted from 0; the first step has one above 0 already.

    Args:
        kind: "constant" stays at the peak; "cosine" and "linear" fall from the end of the warm-up
            on; "wsd" (warm-up, stable, decay) stays and falls linearly over the last steps.
        peak: The highest rate.
        warmup: Steps of linear warm-up.
        total: All steps; 0 keeps the rate constant whatever the kind.
        decay_share: The share of all steps over which wsd falls.
    """
    if kind == "constant" or not total:
        rate = optax.schedules.linear_schedule(0.0, peak, warmup + 1)
    elif kind == "cosine":
        rate = optax.schedules.warmup_cosine_decay_schedule(0.0, peak, warmup, total, _END * peak)
    else:
        share = decay_share if kind == "wsd" else 1.0
        falls = min(round(share * total), total - warmup)
        up = optax.schedules.linear_schedule(0.0, peak, warmup)
        down = optax.schedules.linear_schedule(peak, _END * peak, falls, total - warmup - falls)
        rate = optax.schedules.join_schedules([up, down], [warmup])
    # Steps count from 0, where the rate is 0: the first would train nothing.
    return lambda step: rate(step + 1)
