"""Which parameters are learnt, by patterns of their names; the others are used as they are.

Parameters are cut in two trees, those that are learnt and those that are frozen. Gradients, their
norm and the optimiser's state are of the first alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import jax
from flax import nnx

from klong_jax.core.errors import UserError
from klong_jax.models.decoder import Params


@dataclass(frozen=True)
class Selection:
    """What is learnt: everything, unless it is frozen.

    Attributes:
        frozen: Patterns of names such as blocks.query.kernel, in which `*` stands for anything.
        learnt: Patterns of names outside of which all is frozen.
    """

    frozen: tuple[str, ...] = ()
    learnt: tuple[str, ...] = ("*",)

    def split(self, params: Params) -> tuple[Params, Params]:
        """The parameters that are learnt and those that are frozen, each under its path."""
        learnt, frozen = nnx.split_state(params, lambda path, _: self._learns(_name(path)), ...)
        return learnt, frozen

    def share(self, params: Params) -> float:
        """The share of all parameters, counted in numbers, that are learnt."""
        learnt, frozen = (
            sum(leaf.size for leaf in jax.tree.leaves(part)) for part in self.split(params)
        )
        return float(learnt / (learnt + frozen))

    def check(self, params: Params) -> None:
        """Refuses what cannot be meant.

        Raises:
            UserError: A pattern fits no parameter, or nothing is left to learn.
        """
        names = [_name(path) for path, _ in nnx.to_flat_state(params)]
        for pattern in self.frozen:
            if not any(fnmatchcase(name, pattern) for name in names):
                close = get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
                raise UserError(
                    f"optimizer.frozen={pattern}: is the name of no parameter; the closest is "
                    f"{close}."
                )
        if not any(map(self._learns, names)):
            raise UserError(
                f"optimizer.frozen={','.join(self.frozen)}: leaves nothing to train; freeze less."
            )

    def _learns(self, name: str) -> bool:
        return _fits(name, self.learnt) and not _fits(name, self.frozen)


EVERYTHING = Selection()


def joined(params: Params, part: Params) -> Params:
    """Parameters with those of a part in their places: the other half, or newer ones."""
    return nnx.merge_state(params, part)


def restricted(params: Params, part: Params) -> Params:
    """Those parameters that a part has too."""
    paths = {path for path, _ in nnx.to_flat_state(part)}
    return nnx.split_state(params, lambda path, _: path in paths, ...)[0]


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
