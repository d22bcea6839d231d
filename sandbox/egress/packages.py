"""Packages by the URLs of their indexes and by the names of their files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

PYPI, PYPI_FILES = "https://pypi.org/simple", "files.pythonhosted.org"
NPM = "https://registry.npmjs.org"

# What a package's name stands behind, whatever the host.
_PAGES = re.compile(r"/(?:simple|pypi|project|web/simple)/([^/]+)")
_FILE = re.compile(
    r"\.(?:whl|egg|zip|conda|exe|msi|rpm|tgz|tbz2?|txz|tar|tar\.[a-z0-9]+)"
    r"(?:\.(?:metadata|asc|sig|provenance))?$"
)
_NAME = re.compile(r"(?:@[a-z0-9._~-]+/)?[a-z0-9._~-]+", re.IGNORECASE)


def name_of(text: str) -> str:
    """The one form of a package's name (PEP 503).

    Raises:
        ValueError: it is no name.
    """
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text[:100]!r} is no package's name")
    return re.sub(r"[-_.]+", "-", text).lower()


class Index:
    """One package index that is offered."""

    def __init__(self, url: str, *hosts: str) -> None:
        """Describes it.

        Args:
            url: Its root.
            hosts: Other hosts that serve its files.
        """
        parts = urlsplit(url)
        self._host, self._path = parts.netloc.lower(), parts.path.rstrip("/").lower()
        self._hosts = hosts

    def serves(self, host: str) -> bool:
        """Whether a host has anything of the index."""
        return host == self._host or host in self._hosts

    def offers(self, host: str, path: str) -> bool:
        """Whether a URL is a page of the index or a file."""
        if host in self._hosts:
            return True
        below = f"{path}/".startswith(f"{self._path}/") or path.startswith("/pypi/")
        return host == self._host and (below or _FILE.search(path) is not None)


class BlockedPackages:
    """Names of packages that no index gives out."""

    def __init__(self, names: Iterable[str], npm: str) -> None:
        """Takes the names.

        Args:
            names: As a spec has them.
            npm: Root of the npm registry.
        """
        self._names = {name_of(name) for name in names}
        self._npm = Index(npm)
        self._npm_root = urlsplit(npm).path.rstrip("/")
        names_of_files = "|".join(re.escape(name.rpartition("/")[2]) for name in self._names)
        self._files = re.compile(rf"(?:{names_of_files})-v?[0-9]") if self._names else None

    def cover(self, host: str, read: Iterable[tuple[str, str]]) -> bool:
        """Whether any reading of a URL asks for one, by a page's name or by a file's."""
        if self._files is None:
            return False
        for path, _ in read:
            named = [match[1] for match in _PAGES.finditer(path)]
            if self._npm.offers(host, path):
                rest = path.removeprefix(self._npm_root).strip("/").split("/")
                named += [rest[0], "/".join(rest[:2])]
            if any(re.sub(r"[-_.]+", "-", name) in self._names for name in named):
                return True
            file = re.sub(r"[-_.]+", "-", path.rpartition("/")[2])
            if _FILE.search(path) and self._files.match(file):
                return True
        return False
