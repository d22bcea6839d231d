"""Blocked URL prefixes: what each covers, on the sites that serve the same thing as well."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from sandbox.egress.urls import BadUrl, host_of, readings, resolved

# Where else GitHub and others serve a repository ({p}: owner/name). What can fetch any repository
# by a number or a query goes as a whole.
_GITHUB = (
    "raw.githubusercontent.com/{p}",
    "raw.github.com/{p}",
    "codeload.github.com/{p}",
    "api.github.com/repos/{p}",
    "api.github.com/repositories",
    "api.github.com/graphql",
    "api.github.com/search",
    "uploads.github.com/repos/{p}",
    "media.githubusercontent.com/media/{p}",
    "patch-diff.githubusercontent.com/raw/{p}",
    "github.dev/{p}",
    "ghcr.io/v2/{p}",
    "cdn.jsdelivr.net/gh/{p}",
    "cdn.jsdelivr.net/combine",
    "fastly.jsdelivr.net/gh/{p}",
    "gcore.jsdelivr.net/gh/{p}",
    "testingcf.jsdelivr.net/gh/{p}",
    "quantil.jsdelivr.net/gh/{p}",
    "data.jsdelivr.com/v1/packages/gh/{p}",
    "data.jsdelivr.com/v1/package/gh/{p}",
    "raw.githack.com/{p}",
    "rawcdn.githack.com/{p}",
    "cdn.statically.io/gh/{p}",
)
_SITES = {
    "github.com": _GITHUB,
    "gitlab.com": ("gitlab.com/api",),
    "huggingface.co": (
        "hf.co/{p}",
        "huggingface.co/api/{p}",
        "huggingface.co/api/models/{p}",
    ),
}


@dataclass(frozen=True)
class Prefix:
    """A blocked URL prefix in its one form; the path has no slash at its end."""

    host: str
    path: str


def prefix_of(text: str) -> Prefix:
    """Reads what a spec blocks.

    Raises:
        BadUrl: it is no http or https URL of a host and a path alone.
    """
    try:
        url = urlsplit(text)
        extra = url.query or url.fragment or "@" in url.netloc or ":" in url.netloc
    except ValueError:
        raise BadUrl(f"{text[:100]!r} is no URL") from None
    if url.scheme not in ("http", "https") or extra:
        raise BadUrl(f"{text[:100]!r}: write it as https://HOST/PATH, without user, port and query")
    path = resolved(readings(url.path or "/")[-1][0]).rstrip("/")
    return Prefix(host_of(url.netloc).removeprefix("www."), path)


def elsewhere(prefix: Prefix) -> Iterator[Prefix]:
    """Where else the thing is known to be served: of a page in a repository, the repository."""
    sites = _SITES.get(prefix.host, ())
    parts = prefix.path.split("/")[1:]
    if not parts:
        return
    count = 3 if prefix.host == "huggingface.co" and parts[0] in ("datasets", "spaces") else 2
    place = "/".join(parts[:count]).removesuffix(".git")
    for site in sites:
        host, _, path = site.format(p=place).partition("/")
        yield Prefix(host, f"/{path}")
    if prefix.host == "github.com" and re.fullmatch(r"[a-z0-9-]+", parts[0]):
        pages = "/".join(["", *place.split("/")[1:]]).rstrip("/")
        yield Prefix(f"{parts[0]}.github.io", pages)


class Blocks:
    """A set of blocked prefixes, ready to match."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Reads what a spec blocks."""
        given = [prefix_of(text) for text in texts]
        self._paths: dict[str, list[re.Pattern[str]]] = {}
        for prefix in (*given, *(other for one in given for other in elsewhere(one))):
            # It ends where a word does: of github.com/a/b, b.git and b/c are part, not b2.
            path = re.compile(re.escape(prefix.path) + r"(?![\w-])" if prefix.path else "")
            self._paths.setdefault(prefix.host, []).append(path)
        # As an argument of another site's: an archive of the web, or another's proxy.
        inside = [
            rf"{re.escape(p.host)}\.?(?::\d+)?{re.escape(p.path).replace('/', '[/:]', 1)}(?![\w-])"
            for p in given
        ]
        self._inside = re.compile(rf"(?<![\w-])(?:{'|'.join(inside)})") if inside else None
        hosts = "|".join(re.escape(p.host) for p in given)
        self._root = re.compile(rf"(?<![\w-])(?:{hosts})\.?(?::\d+)?$")

    def cover(self, host: str, read: Iterable[tuple[str, str]]) -> bool:
        """Whether any reading of a URL is blocked.

        Args:
            host: In its one form.
            read: What `readings` gives.
        """
        patterns = self._paths.get(host.removeprefix("www."), ())
        for path, query in read:
            if any(pattern.match(path) for pattern in patterns):
                return True
            if self._inside is not None and self._inside.search(self._flat(f"{path}?{query}")):
                return True
        return False

    def _flat(self, text: str) -> str:
        """A text with the paths of URLs in it as a server resolves them, up to their hosts."""
        parts: list[str] = []
        # Go's proxy writes a capital as ! and the small letter.
        for part in re.split(r"[/\\]+", re.sub(r"[\t\r\n]|!(?=[a-z])", "", text)):
            if part == "..":
                if parts and not self._root.search(parts[-1]):
                    parts.pop()
            elif part != ".":
                parts.append(part)
        return "/".join(parts)
