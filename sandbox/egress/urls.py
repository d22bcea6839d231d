"""URLs as a hostile client may write them, and every way in which a server may read them."""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import unquote

# The last label begins with a letter: no IP literal does, whether dotted, decimal, hex or octal.
_HOST = re.compile(
    r"(?=.{1,253}$)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
)
_NUMBER = r"(?:0x[0-9a-f]*|[0-9]+)"
_ADDRESS = re.compile(rf"\[.*|.*:.*:.*|{_NUMBER}(?:\.{_NUMBER})*", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

# Layers of percent-encoding that are taken off; a deeper one is refused.
_ROUNDS = 6
MAX_TARGET = 16_384
"""Characters that the path and query of a request may have."""


class BadUrl(ValueError):
    """What cannot be brought into one form, and so cannot be judged; the text says why."""


def host_of(text: str) -> str:
    """The one form of a host's name: small letters, no dot at the end.

    Raises:
        BadUrl: it is no name of a host on the internet.
    """
    host = text.lower()
    host = host[:-1] if host.endswith(".") else host
    if not _HOST.fullmatch(host):
        raise BadUrl(f"{text[:100]!r} is no host's name")
    return host


def is_address(text: str) -> bool:
    """Whether a host is given by its IP address, in any of the ways that programs understand."""
    return _ADDRESS.fullmatch(text.strip().rstrip(".")) is not None


def split_authority(text: str) -> tuple[str, int | None]:
    """Host and port of `host[:port]`, as they are written.

    Raises:
        BadUrl: it holds a user, or a port that is none.
    """
    host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not colon:
        host, port = text, ""
    if "@" in text or (colon and not re.fullmatch(r"[0-9]{1,5}", port)):
        raise BadUrl(f"{text[:100]!r} is no host and port")
    return host, int(port) if port else None


def readings(target: str) -> list[tuple[str, str]]:
    r"""Every way to read the path and the query of a request, letters folded to one case.

    A server may decode percent-encoding once, or a server behind it again; resolve dots before or
    after; take `\` for `/`, and `;...` for no part of a name. What is wanted by any reading is
    taken to be wanted.

    Raises:
        BadUrl: it cannot be read, or only in too many steps.
    """
    path, _, query = target.partition("?")
    if not path.startswith("/") or "#" in target or len(target) > MAX_TARGET:
        raise BadUrl("the path does not begin with /, has a fragment, or is too long")
    found: dict[tuple[str, str], None] = {}
    for _ in range(_ROUNDS):
        if _CONTROL.search(path):
            raise BadUrl("the path holds a control character")
        folded = _slashes(_fold(path))
        bare = _slashes(re.sub(r";[^/]*", "", folded))
        for one in (folded, bare):
            found[one, _fold(query)] = None
            found[resolved(one), _fold(query)] = None
        try:
            decoded = unquote(path, errors="strict"), unquote(query, errors="replace")
        except UnicodeDecodeError:
            raise BadUrl("the path is not UTF-8") from None
        if decoded == (path, query):
            return list(found)
        path, query = decoded
    raise BadUrl("percent-encoding within percent-encoding")


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _slashes(path: str) -> str:
    return re.sub(r"[/\\]+", "/", path)


def resolved(path: str) -> str:
    """A path without `.` and `..`."""
    parts: list[str] = []
    for part in path.split("/")[1:]:
        if part == "..":
            del parts[-1:]
        elif part != ".":
            parts.append(part)
    return "/" + "/".join(parts)
