"""Where metrics are shown beside their file: TensorBoard, and Weights & Biases."""

import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import write_text

_FLUSH_S = 10

TrackerName = Literal["tensorboard", "wandb"]


class Tracker(Protocol):
    """Shows metrics to people; what is true is in the file."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Shows the numbers of one step; after a restart those of all steps come again."""
        ...

    def close(self) -> None:
        """Hands over what is still held."""
        ...


class TensorBoard:
    """Event files in the folder `tensorboard`."""

    def __init__(self, folder: Path) -> None:
        """Removes those of earlier starts, whose steps will be shown again.

        Args:
            folder: The stage's folder.
        """
        place = folder / "tensorboard"
        shutil.rmtree(place, ignore_errors=True)
        library = _library("tensorboard", "tensorboardX")
        self._writer = library.SummaryWriter(str(place), flush_secs=_FLUSH_S)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Shows the numbers of one step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases that goes on under its name when training does.

    Of a step that is shown again it keeps what it was shown first, which is the same. Its own
    variables (WANDB_PROJECT, WANDB_MODE and others) say where it is shown.
    """

    def __init__(self, folder: Path) -> None:
        """Begins, or goes on with, the folder's run.

        Args:
            folder: The stage's folder.
        """
        name = folder / "wandb_run.txt"
        if not name.exists():
            write_text(name, uuid4().hex[:12])
        library = _library("wandb", "wandb")
        try:
            self._run = library.init(
                id=name.read_text(),
                name=f"{folder.parent.name}/{folder.name}",
                dir=folder,
                resume="allow",
                settings={"silent": True},
            )
        except library.Error as error:
            raise UserError(f"log_to=wandb: {error} Or set WANDB_MODE=offline.") from None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Shows the numbers of one step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()


_TRACKERS: dict[TrackerName, Callable[[Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


def open_trackers(names: Sequence[TrackerName], folder: Path) -> list[Tracker]:
    """Opens trackers for a stage's folder.

    Raises:
        UserError: The library of one is not installed.
    """
    return [_TRACKERS[name](folder) for name in names]


def _library(extra: str, module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise UserError(
            f"log_to={extra}: {module} is not installed; run `pip install klong-jax[{extra}]` or "
            "leave it out."
        ) from None
