"""JSON documents that carry their own hash, by which a torn or altered one is known."""

import json
from pathlib import Path

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import Json, content_hash, read_json, write_text


def write_sealed(path: Path, body: Json) -> None:
    """Writes a document atomically."""
    write_text(path, json.dumps({"sha256": content_hash(body), "body": body}) + "\n")


def read_sealed(path: Path, corpus: Path) -> tuple[Json, str]:
    """Reads a document of a cached corpus.

    Returns:
        The document and its hash.

    Raises:
        UserError: It is not what was written.
    """
    try:
        sealed = read_json(path)
    except UserError:
        raise spoilt(path, "is missing or is not JSON", corpus) from None
    if not isinstance(sealed, dict) or sealed.get("sha256") != content_hash(sealed.get("body")):
        raise spoilt(path, "is not as it was written", corpus)
    return sealed["body"], sealed["sha256"]


def spoilt(path: Path, problem: str, corpus: Path) -> UserError:
    """The error of a file of a cached corpus that cannot be used."""
    return UserError(f"{path}: {problem}; delete the folder {corpus} and it is made again.")
