"""One shard of a tokenised corpus: a folder that is there when it is complete, and not before.

A shard holds some consecutive records of a source: the tokens of all of them end to end, the
lengths of all their turns, and notes on what is whose. Its arrays are read as they lie on disk.
"""

import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import Json
from klong_jax.core.trajectory import Turn
from klong_jax.sft.sealed import read_sealed, spoilt, write_sealed
from klong_jax.text.formats import Recording

TOKENS, TURNS, NOTES = "tokens.npy", "turns.npy", "shard.json"
RESTART, CONTEXT = 1, 2
"""Flags of a turn: a window begins with it whatever fits; its output is not trained."""
DTYPES: dict[str, np.dtype[Any]] = {TOKENS: np.dtype("<i4"), TURNS: np.dtype("<i8")}


class Tokenised(NamedTuple):
    """A recording as tokens.

    Attributes:
        turns: Its turns.
        prefix_len: Tokens of its pinned prefix.
        remarks: What is to be told of it, a sentence each.
    """

    turns: Sequence[Turn]
    prefix_len: int
    remarks: tuple[str, ...] = ()


Tokenise = Callable[[Recording], Tokenised]
"""Tokenises a recording; raises UserError to refuse it."""


@dataclass(frozen=True, eq=False)
class Shard:
    """What is known of a shard without touching its tokens.

    Attributes:
        folder: Where it lies, in the folder of its corpus.
        records: Hash of the records that it was made of.
        lengths: int64[trajectories, 3], each trajectory's turns, tokens and pinned tokens.
        skipped: Why records were passed over, a sentence each.
        remarks: What is to be told of the others, a sentence each.
        digest: Hash of its notes, which hold the hashes of its arrays.
    """

    folder: Path
    records: str
    lengths: np.ndarray
    skipped: tuple[str, ...]
    remarks: tuple[str, ...]
    digest: str

    def names(self) -> list[tuple[str, str]]:
        """Each trajectory's recording id and source."""
        return [(name, source) for name, source in self._notes()["names"]]

    def array(self, name: str) -> np.ndarray:
        """One of its arrays, mapped into memory.

        Raises:
            UserError: The file is not the array that was written.
        """
        turns, tokens, _ = self.lengths.sum(axis=0)
        shape = {TOKENS: (tokens,), TURNS: (turns, 3)}[name]
        path = self.folder / name
        try:
            array: np.ndarray = np.load(path, mmap_mode="r")
        except (OSError, ValueError):
            raise spoilt(path, "is not an array", self.folder.parent) from None
        if array.dtype != DTYPES[name] or array.shape != shape:
            problem = f"holds {array.dtype} in shape {array.shape} instead of {shape}"
            raise spoilt(path, problem, self.folder.parent)
        return array.view(np.ndarray)

    def verify(self) -> None:
        """Reads everything and compares checksums.

        Raises:
            UserError: A file is not as it was written; names it.
        """
        for name, noted in self._notes()["files"].items():
            if _sha256(self.folder / name) != noted["sha256"]:
                raise spoilt(self.folder / name, "is not as it was written", self.folder.parent)

    def _notes(self) -> Json:
        return read_sealed(self.folder / NOTES, self.folder.parent)[0]


def open_shard(folder: Path) -> Shard:
    """Reads a shard's notes and compares the sizes and headers of its arrays with them.

    Raises:
        UserError: Something is missing, cut short or of another shape; names the file.
    """
    notes, digest = read_sealed(folder / NOTES, folder.parent)
    shard = Shard(
        folder=folder,
        records=notes["records"],
        lengths=np.array(notes["lengths"], np.int64).reshape(-1, 3),
        skipped=tuple(notes["skipped"]),
        remarks=tuple(notes["remarks"]),
        digest=digest,
    )
    for name, noted in notes["files"].items():
        path = folder / name
        size = path.stat().st_size if path.exists() else 0
        if size != noted["bytes"]:
            problem = f"has {size} bytes instead of {noted['bytes']}"
            raise spoilt(path, problem, folder.parent)
        shard.array(name)
    return shard


def write_shard(folder: Path, records: Sequence[Recording | str], tokenise: Tokenise) -> None:
    """Tokenises records into a shard, which appears whole or not at all.

    Args:
        folder: The shard to be; another process may make the same meanwhile.
        records: The records; in the place of one that could not be read, a sentence that says why.
        tokenise: Tokenises one; records that it refuses are noted as skipped.

    Raises:
        UserError: The disk refuses; names the folder.
    """
    names: list[tuple[str, str]] = []
    lengths: list[tuple[int, int, int]] = []
    skipped: list[str] = []
    remarks: list[str] = []
    parts: dict[str, list[np.ndarray]] = {
        TOKENS: [np.zeros(0, DTYPES[TOKENS])],
        TURNS: [np.zeros((0, 3), DTYPES[TURNS])],
    }
    for record in records:
        if isinstance(record, str):
            skipped.append(record)
            continue
        try:
            made = tokenise(record)
            tokens, turns = _arrays(record, made)
        except UserError as error:
            skipped.append(str(error))
            continue
        parts[TOKENS].append(tokens)
        parts[TURNS].append(turns)
        names.append((record.recording_id, record.source))
        lengths.append((len(turns), len(tokens), made.prefix_len))
        remarks += (f"{record.source}: {remark}" for remark in made.remarks)
    with _appearing(folder) as scratch:
        files = {name: _save(scratch / name, np.concatenate(parts[name])) for name in parts}
        notes = {
            "records": hash_records(records),
            "names": names,
            "lengths": lengths,
            "skipped": skipped,
            "remarks": remarks,
            "files": files,
        }
        write_sealed(scratch / NOTES, notes)


def hash_records(records: Sequence[Recording | str]) -> str:
    """Identifies what records say; their file's name does not count."""
    digest = hashlib.sha256()
    for record in records:
        said = (
            ""
            if isinstance(record, str)
            else (record.messages, record.pinned_messages, record.untrained)
        )
        digest.update(repr(said).encode())
    return digest.hexdigest()


def sweep(corpus: Path) -> None:
    """Removes what processes of this host that were killed left half-written in a corpus."""
    for scratch in corpus.glob(f".*.{socket.gethostname()}.*.tmp"):
        shutil.rmtree(scratch, ignore_errors=True)


def _arrays(recording: Recording, made: Tokenised) -> tuple[np.ndarray, np.ndarray]:
    """A recording's tokens, and of each turn two lengths and its flags."""
    rows = [(len(turn.suffix_ids), len(turn.output_ids), _flags(turn)) for turn in made.turns]
    turns = np.array(rows, DTYPES[TURNS]).reshape(-1, 3)
    if not any(turn.trained and turn.output_ids for turn in made.turns):
        raise UserError(
            f"{recording.source}: the assistant says nothing, so no token can be trained; remove "
            "the record."
        )
    if made.prefix_len > turns[:, :2].sum():
        raise UserError(
            f"{recording.source}: messages after the assistant's last are pinned; pin fewer."
        )
    tokens = np.concatenate(
        [
            np.array(ids, DTYPES[TOKENS])
            for turn in made.turns
            for ids in (turn.suffix_ids, turn.output_ids)
        ]
    )
    return tokens, turns


def _flags(turn: Turn) -> int:
    return (RESTART if turn.restart else 0) | (0 if turn.trained else CONTEXT)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Yields a hidden folder to write into, which takes its name when all of it is on disk."""
    scratch = folder.with_name(f".{folder.name}.{socket.gethostname()}.{uuid4().hex}.tmp")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        _sync(scratch)
        scratch.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        # Where another process was first with the same shard, its is as good.
        if not folder.exists():
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); free space or choose another "
                "folder."
            ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _save(path: Path, array: np.ndarray) -> Json:
    """Writes an array to disk, and gives what the notes say about the file."""
    with path.open("wb") as handle:
        np.save(handle, array)
        handle.flush()
        os.fsync(handle.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sync(folder: Path) -> None:
    """Puts a folder's list of files on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
