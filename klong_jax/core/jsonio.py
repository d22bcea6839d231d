"""JSON and JSONL on disk: atomic writes, and errors that name the file and the place."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from klong_jax.core.errors import UserError

Json = Any


def canonical(value: Json) -> bytes:
    """The one spelling of a JSON value that hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def content_hash(value: Json | bytes) -> str:
    """Hex SHA-256 of bytes, or of the canonical spelling of a JSON value."""
    data = value if isinstance(value, bytes) else canonical(value)
    return hashlib.sha256(data).hexdigest()


def read_json(path: Path) -> Json:
    """Reads one JSON document.

    Raises:
        UserError: The file is missing or is not JSON; the message names file, line and column.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        place = f":{error.lineno}:{error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8 text"
        raise UserError(f"{path}{place}: not valid JSON ({reason}); mend or remove it.") from None


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old content or the new, never half of it.

    Raises:
        UserError: The disk refuses (missing, full, read-only); the message names the path.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with scratch.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(scratch, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free space or choose another folder."
        ) from None


def write_json(path: Path, value: Json) -> None:
    """Writes one JSON document atomically, indented for people."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Json]) -> None:
    """Writes one JSON document a line, atomically; ASCII, so that any string survives."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[tuple[int, Json]]:
    """Yields (line number from 1, document); blank lines are passed over.

    Raises:
        UserError: A line is not JSON; the message names file and line.
    """
    try:
        # Not splitlines(): it also cuts at separators that JSON allows inside a string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; convert or remove the file.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number}: not valid JSON ({error.msg}); mend or remove the line."
            ) from None
