"""Checkpoints: Orbax arrays, and a small JSON beside them that says what they belong to.

A save copies the state to the host and returns; the disk is written to meanwhile, and what is not
completely there has a name that nothing picks up.
"""

import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from klong_jax.core.errors import UserError
from klong_jax.models.decoder import Params
from klong_jax.training.accumulate import TrainState
from klong_jax.training.average import Averaged
from klong_jax.training.frozen import joined, restricted

_HASH = 64  # hexadecimal digits

# Tensorstore, which writes the arrays, says ValueError where a disk is full.
_TENSORSTORE_CODE = re.compile(r"os_error_code='(\d+)'")

# What fails behind the scenes is raised in front of them; Orbax would print it there as well.
logging.getLogger("absl").addFilter(lambda record: record.exc_info is None)


class Checkpoints:
    """The checkpoints of one training stage; a save is complete or it is not there."""

    def __init__(
        self,
        root: Path,
        identity: dict[str, str],
        keep: int = 2,
        keep_best: int = 0,
        *,
        tidy: bool = False,
    ) -> None:
        """Opens a directory of checkpoints.

        Args:
            root: The directory; made if missing.
            identity: What a checkpoint must match to be restored: model and tokenizer hashes, and
                the adapters if there are any.
            keep: How many of the latest to keep.
            keep_best: How many to keep beside them of those saved with the lowest loss.
            tidy: Remove what saves that were cut off have left; for the one who writes here.

        Raises:
            UserError: The directory cannot be made.
        """
        self._root = root
        self._identity = identity
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{root}: cannot hold checkpoints ({error.strerror}); choose another runs folder."
            ) from None
        kept = [
            ocp.checkpoint_managers.LatestN(keep),
            ocp.checkpoint_managers.BestN(
                get_metric_fn=_rank,
                reverse=True,
                n=keep_best,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(kept),
            # With it Orbax writes the loss down, and complains where there is none.
            best_fn=_rank if keep_best else None,
            best_mode="min",
            cleanup_tmp_directories=tidy,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(root.resolve(), options=options)

    def latest(self) -> int | None:
        """The last complete step, or None."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """The complete steps that are kept, in order."""
        with self._writing():
            self._manager.wait_until_finished()
        return sorted(map(int, self._manager.all_steps()))

    def save(self, state: TrainState, progress: dict[str, Any], loss: float | None = None) -> None:
        """Begins to save state and progress (data position, random state, stage) under its step.

        The state may be changed or donated once this returns. A save waits for the one before it,
        and so do `close` and all that reads.

        Args:
            state: What is saved; all processes save the same step.
            progress: What JSON can hold.
            loss: What the best are chosen by.

        Raises:
            UserError: The disk refuses this save, or has refused the last.
        """
        items = {name: ocp.args.StandardSave(_plain(part)) for name, part in _parts(state).items()}
        with self._writing():
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    progress=ocp.args.JsonSave({"identity": self._identity, **progress}), **items
                ),
                metrics=None if loss is None else {"loss": loss},
                # Orbax would pass over steps by rules of its own.
                force=True,
            )

    def close(self) -> None:
        """Waits for the last save and releases the directory.

        Raises:
            UserError: The disk has refused the last save.
        """
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):
                reason = error.strerror or "another process did not finish its part"
            elif code := _TENSORSTORE_CODE.search(str(error)):
                reason = os.strerror(int(code[1]))
            else:
                raise
            raise UserError(
                f"{self._root}: the checkpoint cannot be written ({reason}); free space "
                "and run the same command again to resume."
            ) from None

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the latest checkpoint to go on training.

        Args:
            like: A state of the right structure and shapes.

        Returns:
            The state, and the progress that was saved with it.

        Raises:
            UserError: There is none, or it belongs to another model, tokenizer or optimiser.
        """
        step, progress = self._checked()
        parts = _parts(like)
        self._check_optimizer(step, parts)
        read = {name: self._read(step, name, part) for name, part in parts.items()}
        opt_state, taken = read["optimizer"]
        if "average" in read:
            opt_state = Averaged(opt_state, restricted(read["average"], like.opt_state.average))
        return TrainState(read["params"], opt_state, taken), progress

    def restore_params(
        self, like: Params, *, as_stored: bool = False, step: int | None = None
    ) -> Params:
        """Reads the parameters of a checkpoint, whatever they were trained with.

        Where training kept an average of them, that is what is read.

        Args:
            like: Parameters, or their shapes, of the right structure.
            as_stored: Read each in the dtype it was saved in, not in that of `like`.
            step: Which; the latest if not given.

        Raises:
            UserError: There is none, or it belongs to another model or tokenizer.
        """
        step, _ = self._checked(step)
        item = "average" if self._holds(step, "average") else "params"
        if as_stored:
            like = self._with_stored_dtypes(step, item, like)
        return self._read(step, item, like)

    def _checked(self, wanted_step: int | None = None) -> tuple[int, dict[str, Any]]:
        kept = self.steps()
        if not kept:
            raise UserError(f"{self._root}: holds no checkpoint; train first or check the path.")
        step = kept[-1] if wanted_step is None else wanted_step
        if step not in kept:
            raise UserError(
                f"{self._root}: holds no checkpoint {step}; choose one of "
                f"{', '.join(map(str, kept))}."
            )
        progress: dict[str, Any] = self._manager.restore(
            step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
        ).progress
        stored: dict[str, str] = progress["identity"]
        for name in {**self._identity, **stored}:
            found, wanted = (_short(of.get(name, "none")) for of in (stored, self._identity))
            if found != wanted:
                raise UserError(
                    f"{self._root}: the checkpoint belongs to another {name} ({found}, not "
                    f"{wanted}); use the {name} it was trained with or another run."
                )
        return step, progress

    def _check_optimizer(self, step: int, parts: dict[str, Any]) -> None:
        stored = {name: leaf.shape for name, leaf in self._stored(step, "optimizer").items()}
        wanted = {name: leaf.shape for name, leaf in _plain(parts["optimizer"]).items()}
        if stored != wanted or self._holds(step, "average") != ("average" in parts):
            raise UserError(
                f"{self._root}: the checkpoint's optimiser holds other arrays than the one that "
                "is set; use the settings of `optimizer` (kind, frozen, ema_decay) it was "
                "trained with, or another run."
            )

    def _holds(self, step: int, item: str) -> bool:
        return (self._root / str(step) / item).exists()

    def _stored(self, step: int, item: str) -> dict[str, Any]:
        """Shapes and dtypes on disk by position."""
        folder = self._root.resolve() / str(step) / item
        tree: dict[str, Any] = ocp.StandardCheckpointHandler().metadata(folder).tree
        return tree

    def _with_stored_dtypes(self, step: int, item: str, like: Params) -> Params:
        stored = self._stored(step, item)
        leaves = [
            ocp.utils.to_shape_dtype_struct(leaf, stored[str(index)].dtype)
            for index, leaf in enumerate(jax.tree.leaves(like))
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _read(self, step: int, item: str, like: Any) -> Any:
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        restored = self._manager.restore(
            step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(shapes)})
        )[item]
        leaves = [restored[str(index)] for index in range(len(restored))]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _parts(state: TrainState) -> dict[str, Any]:
    """What is saved under which name; an average stands apart, for those who only act.

    They need the frozen parameters beside it.
    """
    optimizer, average = state.opt_state, {}
    if isinstance(optimizer, Averaged):
        optimizer, average = optimizer.inner, {"average": joined(state.params, optimizer.average)}
    return {"params": state.params, "optimizer": (optimizer, state.step), **average}


def _plain(tree: Any) -> dict[str, jax.Array]:
    """The arrays of a tree by position: what is on disk knows no Python class."""
    return {str(index): leaf for index, leaf in enumerate(jax.tree.leaves(tree))}


def _short(identity: str) -> str:
    """What is shown of an identity: hashes by their beginning."""
    return identity[:12] if len(identity) == _HASH else identity


def _rank(metrics: dict[str, float]) -> float:
    """What checkpoints are compared by; a loss that is no number is worse than any."""
    return math.inf if math.isnan(metrics["loss"]) else metrics["loss"]
