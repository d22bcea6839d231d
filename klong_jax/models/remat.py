"""What a layer keeps for its backward pass, by name; the rest is computed a second time."""

from collections.abc import Callable
from typing import Any

import jax

from klong_jax.core.errors import UserError
from klong_jax.kernels.attention import SAVED
from klong_jax.models.config import Remat

_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED),
    ),
}


def rematerialised(
    layer: Callable[..., Any], policy: Remat, *, scanned: bool = True
) -> Callable[..., Any]:
    """The layer under a named policy.

    Args:
        layer: The layer.
        policy: The policy's name.
        scanned: Whether the layer is the body of a loop. Outside of one the compiler has to be kept
            from finding that a forward pass was there before.

    Raises:
        UserError: There is no such policy.
    """
    if policy == "none":
        return layer
    if policy not in _POLICIES:
        known = ", ".join(["none", *_POLICIES])
        raise UserError(f"remat={policy!r} is no policy; choose one of {known}.")
    return jax.checkpoint(layer, policy=_POLICIES[policy], prevent_cse=not scanned)
