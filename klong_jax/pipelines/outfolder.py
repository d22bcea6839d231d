"""A folder that is there when it is complete, and not before."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from klong_jax.core.errors import UserError

_OURS = ("model.json", "config.json")


@contextmanager
def complete_folder(output: Path, *inputs: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a hidden folder beside `output` to write into; it takes its place at the end.

    Args:
        output: The folder to make.
        inputs: Folders that are read meanwhile; the output may not be one of them.
        overwrite: Replace a model that is there already.

    Raises:
        UserError: Something is there already, or the folder cannot be made.
    """
    _check(output, inputs, overwrite=overwrite)
    place = output.resolve()
    scratch = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    old = place.with_name(f".{place.name}.{os.getpid()}.old")
    try:
        with _naming(output):
            scratch.mkdir(parents=True)
        yield scratch
        with _naming(output):
            if place.exists():
                place.rename(old)
            scratch.rename(place)
    finally:
        if old.exists() and not place.exists():
            old.rename(place)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _naming(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output={output}: cannot be written ({error.strerror}); choose another folder."
        ) from None


def _check(output: Path, inputs: tuple[Path, ...], *, overwrite: bool) -> None:
    place = output.resolve()
    for read in inputs:
        if place == read.resolve() or place in read.resolve().parents:
            raise UserError(
                f"output={output}: would replace {read}, which is read; choose another."
            )
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UserError(
            f"output={output}: is there already; choose another folder, or overwrite=true to "
            "replace it."
        )
    if not any((output / name).is_file() for name in _OURS):
        raise UserError(
            f"output={output}: holds something else than a model, which is not overwritten; choose "
            "another folder."
        )
