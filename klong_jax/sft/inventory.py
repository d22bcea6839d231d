"""What tokenised corpora there are on disk, when each was last opened, and removing some.

A corpus goes in one move, out of the way, before its files are deleted; and only while nobody makes
or reads it. So a process that wants it finds all of it or nothing, and then makes it again.
"""

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from klong_jax.core.errors import UserError
from klong_jax.sft.corpus import INDEX, VERSION
from klong_jax.sft.hold import IN_USE, hold_alone
from klong_jax.sft.sealed import read_sealed

State = Literal["complete", "unfinished", "outdated", "spoilt"]

_KEY = re.compile(r"[0-9a-f]{64}")
_GOING = ".removed"


@dataclass(frozen=True)
class Entry:
    """A corpus on disk.

    Attributes:
        folder: Where it lies.
        state: outdated is one of another version, which is not used any more.
        source: The file it was first made of; empty if it is not complete.
        trajectories: How many it holds.
        tokens: Of all of them.
        bytes: What its files take.
        opened: When it was last opened, in seconds since the epoch.
        in_use: Whether a process makes or reads it now.
    """

    folder: Path
    state: State
    source: str
    trajectories: int
    tokens: int
    bytes: int
    opened: float
    in_use: bool


def inventory(root: Path) -> list[Entry]:
    """The corpora in a folder, the last opened first.

    Raises:
        UserError: There is no such folder.
    """
    try:
        folders = [path for path in root.iterdir() if _KEY.fullmatch(path.name)]
    except OSError as error:
        raise UserError(
            f"{root}: cannot be listed ({error.strerror}); name a folder of corpora with path."
        ) from None
    entries = list[Entry]()
    for folder in folders:
        with suppress(FileNotFoundError):  # removed meanwhile
            entries.append(_entry(folder))
    return sorted(entries, key=lambda entry: (-entry.opened, entry.folder))


def superfluous(entries: Sequence[Entry], *, keep: int | None, before: float | None) -> list[Entry]:
    """Those that may go, of entries in order.

    Args:
        entries: The last opened first.
        keep: How many of the last opened stay in any case; None keeps none for that.
        before: Only those last opened before this; None takes all.
    """
    return [
        entry
        for entry in entries[keep or 0 :]
        if not entry.in_use and (before is None or entry.opened < before)
    ]


def remove(entry: Entry) -> bool:
    """Removes a corpus, unless somebody uses it.

    Raises:
        UserError: The disk refuses.
    """
    held = hold_alone(entry.folder)
    if held is None:
        return False
    going = entry.folder.with_name(f".{entry.folder.name}.{uuid4().hex}{_GOING}")
    try:
        entry.folder.rename(going)
        shutil.rmtree(going)
    except OSError as error:
        raise UserError(
            f"{entry.folder}: cannot be removed ({error.strerror}); check its permissions."
        ) from None
    finally:
        held.release()
    return True


def sweep_removed(root: Path) -> None:
    """Deletes what processes that were killed had moved out of the way already."""
    for going in root.glob(f".*{_GOING}"):
        shutil.rmtree(going, ignore_errors=True)


def _entry(folder: Path) -> Entry:
    used = folder / IN_USE  # which those of earlier versions lack
    opened = (used if used.exists() else folder).stat().st_mtime
    state, body = _index(folder)
    held = hold_alone(folder) if used.exists() else None
    if held is not None:
        held.release()
    return Entry(
        folder=folder,
        state=state,
        source=body.get("source", ""),
        trajectories=body.get("trajectories", 0),
        tokens=body.get("tokens", 0),
        bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        opened=opened,
        in_use=held is None and used.exists(),
    )


def _index(folder: Path) -> tuple[State, dict[str, Any]]:
    if not (folder / INDEX).exists():
        return "unfinished", {}
    try:
        body, _ = read_sealed(folder / INDEX, folder)
    except UserError:
        return "spoilt", {}
    return ("complete", body) if body["version"] == VERSION else ("outdated", {})
