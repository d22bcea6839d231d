"""Parameters that training leaves as they are, chosen by patterns of their names."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import jax
import optax

from klong_jax.core.errors import UserError
from klong_jax.models.decoder import Params


def leave_frozen(
    optimizer: optax.GradientTransformation, patterns: Sequence[str]
) -> optax.GradientTransformation:
    """An optimiser that leaves parameters alone and keeps no state for them.

    Their gradients count for nothing, not even for the norm that is clipped.

    Args:
        optimizer: Updates the others.
        patterns: Of names such as blocks.query.kernel, in which `*` stands for anything.
    """

    def learnt(params: Params) -> Params:
        return jax.tree.map(lambda name: not _fits(name, patterns), _named(params))

    def frozen(params: Params) -> Params:
        return jax.tree.map(lambda name: _fits(name, patterns), _named(params))

    def init(params: Params) -> Any:
        _check(patterns, jax.tree.leaves(_named(params)))
        return whole.init(params)

    whole = optax.chain(optax.masked(optimizer, learnt), optax.masked(optax.set_to_zero(), frozen))
    return optax.GradientTransformation(init, whole.update)


def _check(patterns: Sequence[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
            raise UserError(
                f"optimizer.frozen={pattern}: is the name of no parameter; the closest is {close}."
            )
    if all(_fits(name, patterns) for name in names):
        raise UserError(
            f"optimizer.frozen={','.join(patterns)}: leaves nothing to train; freeze less."
        )


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _named(params: Params) -> Params:
    """The name of each parameter in its place."""

    def name(path: tuple[Any, ...], _: Any) -> str:
        return ".".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))

    return jax.tree_util.tree_map_with_path(name, params)
