"""Checkpoints: Orbax arrays, and a small JSON beside them that says what they belong to."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from klong_jax.core.errors import UserError
from klong_jax.models.decoder import Params
from klong_jax.training.accumulate import TrainState


class Checkpoints:
    """The checkpoints of one training stage; a save is complete or it is not there."""

    def __init__(self, root: Path, identity: dict[str, str], keep: int = 2) -> None:
        """Opens a directory of checkpoints.

        Args:
            root: The directory; made if missing.
            identity: What a checkpoint must match to be restored: model and tokenizer hashes.
            keep: How many of the latest to keep.

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
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(root.resolve(), options=options)

    def latest(self) -> int | None:
        """The last complete step, or None."""
        step = self._manager.latest_step()
        return None if step is None else int(step)

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Saves state and progress (data position, random state, stage) under the state's step.

        Raises:
            UserError: The disk refuses.
        """
        try:
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(_plain(state.params)),
                    optimizer=ocp.args.StandardSave(_plain((state.opt_state, state.step))),
                    progress=ocp.args.JsonSave({"identity": self._identity, **progress}),
                ),
            )
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            # Tensorstore, which writes the arrays, says ValueError where a disk is full.
            if isinstance(error, ValueError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = error.strerror if isinstance(error, OSError) else "No space left on device"
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
            UserError: There is none, or it belongs to another model or tokenizer.
        """
        step, progress = self._checked()
        rest = self._read(step, "optimizer", (like.opt_state, like.step))
        return TrainState(self._read(step, "params", like.params), *rest), progress

    def restore_params(self, like: Params, *, as_stored: bool = False) -> Params:
        """Reads the parameters of the latest checkpoint, whatever they were trained with.

        Args:
            like: Parameters, or their shapes, of the right structure.
            as_stored: Read each in the dtype it was saved in, not in that of `like`.

        Raises:
            UserError: There is none, or it belongs to another model or tokenizer.
        """
        step, _ = self._checked()
        if as_stored:
            like = self._with_stored_dtypes(step, like)
        return self._read(step, "params", like)

    def close(self) -> None:
        """Releases the directory."""
        self._manager.close()

    def _checked(self) -> tuple[int, dict[str, Any]]:
        step = self.latest()
        if step is None:
            raise UserError(f"{self._root}: holds no checkpoint; train first or check the path.")
        progress: dict[str, Any] = self._manager.restore(
            step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
        ).progress
        for name, wanted in self._identity.items():
            found = progress["identity"].get(name)
            if found != wanted:
                raise UserError(
                    f"{self._root}: the checkpoint belongs to another {name} ({str(found)[:12]}, "
                    f"not {wanted[:12]}); use the {name} it was trained with or another run."
                )
        return step, progress

    def _with_stored_dtypes(self, step: int, like: Params) -> Params:
        folder = self._root.resolve() / str(step) / "params"
        stored = ocp.StandardCheckpointHandler().metadata(folder).tree
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


def _plain(tree: Any) -> dict[str, jax.Array]:
    """The arrays of a tree by position: what is on disk knows no Python class."""
    return {str(index): leaf for index, leaf in enumerate(jax.tree.leaves(tree))}
