"""Readers and writers of trajectory formats; the format is told by content, not by file name."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from klong_jax.core.errors import UserError
from klong_jax.text.formats.atif import ATIF, write_atif
from klong_jax.text.formats.base import Format, Record, Recording, records
from klong_jax.text.formats.mini_swe_agent import MINI_SWE_AGENT
from klong_jax.text.formats.openai import OPENAI, message_to_openai, write_openai_jsonl
from klong_jax.text.formats.openhands import OPENHANDS
from klong_jax.text.formats.sharegpt import SHAREGPT
from klong_jax.text.formats.swe_agent import SWE_AGENT
from klong_jax.text.formats.tau_bench import TAU_BENCH

__all__ = ["FORMATS", "Recording", "detect", "message_to_openai", "read_recordings",
           "recording_files", "write_atif", "write_openai_jsonl"]  # fmt: skip

_LOG = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".traj")
"""Of the files that are read in a folder."""

# In order: the first that matches reads. OpenAI's is the most permissive, so it comes last.
FORMATS = (ATIF, TAU_BENCH, SHAREGPT, OPENHANDS, SWE_AGENT, MINI_SWE_AGENT, OPENAI)


def recording_files(path: Path) -> list[Path]:
    """The files that a path names: itself, or those of recordings in a folder, by name.

    Raises:
        UserError: It is a folder without such files.
    """
    if not path.is_dir():
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not found:
        raise UserError(
            f"{path}: holds no file that ends in {', '.join(SUFFIXES)}; name a file or a folder of "
            "recordings."
        )
    return found


def detect(path: Path) -> str:
    """The name of the format that the first readable record of a file is in.

    Raises:
        UserError: The file is missing, is not JSON, or is in no known format.
    """
    for record in records(path, on_bad=lambda error: None):
        return _format_of(record, path).name
    raise UserError(f"{path}: holds no records; name a file with recordings.")


def read_recordings(
    path: Path,
    *,
    skip_bad: bool = False,
    on_skip: Callable[[str], None] = _LOG.warning,
) -> Iterator[Recording]:
    """Reads the recordings of a file in any known format, or of all such files in a folder.

    Args:
        path: The file, or the folder.
        skip_bad: Whether to pass over records that cannot be read and use the rest.
        on_skip: Told why, for every record passed over, and every file of a folder.

    Raises:
        UserError: A record cannot be read and `skip_bad` is off, or the file as a whole cannot;
            names file, line or record, and field.
    """

    def bad(error: UserError) -> None:
        if not skip_bad:
            raise error
        on_skip(str(error))

    for file in recording_files(path):
        try:
            yield from _read_file(file, bad)
        except UserError as error:
            if file == path:
                raise
            bad(error)


def _read_file(path: Path, on_bad: Callable[[UserError], None]) -> Iterator[Recording]:
    form: Format | None = None
    for record in records(path, on_bad):
        try:
            form = form or _format_of(record, path)
            yield form.read(record)
        except UserError as error:
            on_bad(error)
    if form is None:
        raise UserError(f"{path}: holds no readable record; name a file with recordings.")


def _format_of(record: Record, path: Path) -> Format:
    for form in FORMATS:
        if form.matches(record.value):
            return form
    names = ", ".join(form.name for form in FORMATS)
    raise UserError(f"{record.place}: in none of the known formats ({names}); convert {path.name}.")
