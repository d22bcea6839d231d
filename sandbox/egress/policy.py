"""What may leave a sandbox: a verdict for each request, by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sandbox.egress.blocks import Blocks
from sandbox.egress.packages import NPM, PYPI, PYPI_FILES, BlockedPackages, Index
from sandbox.egress.urls import BadUrl, host_of, is_address, readings, split_authority

PORTS = {"http": 80, "https": 443}
"""The only ports that are let pass, by scheme."""

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
# A request for them would make of HTTP something else, which is not judged.
_SWITCHES = ("upgrade", "http2-settings", "sec-websocket-key")
STRIPPED = (
    "forwarded",
    "x-forwarded-host",
    "x-forwarded-server",
    "x-forwarded-path",
    "x-forwarded-prefix",
    "x-original-host",
    "x-original-url",
    "x-rewrite-url",
    "x-host",
    "x-http-method-override",
)
"""Headers by which some servers take a request for another."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of a request.

    Attributes:
        allowed: Whether it goes out.
        reason: Why, as one word for counting.
        sentence: Why, for whoever asked.
    """

    allowed: bool
    reason: str
    sentence: str = ""


@dataclass(frozen=True)
class Request:
    """A request as the proxy got it; nothing in it is believed.

    Attributes:
        scheme: "http" or "https", as it would go out.
        host: Where it would go.
        port: The port there.
        method: As given.
        target: Path and query, as given.
        names: Every other name of the host that it carries: its Host headers, an absolute
            target, the tunnel's, and the one of the TLS handshake.
        headers: Header names in small letters.
    """

    scheme: str
    host: str
    port: int
    method: str
    target: str
    names: Sequence[str] = ()
    headers: frozenset[str] = field(default_factory=frozenset)


def pattern_of(text: str) -> str:
    """The one form of an allowed host: a name, `*.` and a name for all below it, or `*`.

    Raises:
        BadUrl: it is none of them.
    """
    if text == "*":
        return text
    if text.startswith("*."):
        # Of a top-level domain, too.
        return "*." + host_of(f"x.{text[2:]}")[2:]
    return host_of(text)


class Policy:
    """The verdicts of one sandbox."""

    def __init__(self, asked: Mapping[str, Any], *, pypi: str = PYPI, npm: str = NPM) -> None:
        """Prepares it.

        Args:
            asked: `allow`, `block`, `packages`, `block_packages`, as a spec has them.
            pypi: The simple index that `packages` offers.
            npm: The npm registry that it offers.
        """
        patterns = [pattern_of(text) for text in asked["allow"]]
        self._all = "*" in patterns
        self._hosts = frozenset(p for p in patterns if not p.startswith("*"))
        self._domains = tuple(p[1:] for p in patterns if p.startswith("*."))
        self._blocks = Blocks(asked["block"])
        self._blocked_packages = BlockedPackages(asked["block_packages"], npm)
        offered = {"pypi": Index(pypi, PYPI_FILES), "npm": Index(npm)}
        self._indexes = [offered[name] for name in asked["packages"]]

    def tunnel(self, authority: str) -> Verdict:
        """Whether a tunnel may be asked for; what goes through it is judged by itself."""
        try:
            host, port = split_authority(authority)
            if is_address(host):
                return _address(host)
            host = host_of(host)
        except BadUrl as error:
            return Verdict(False, "malformed", f"{error}.")
        if port not in PORTS.values():
            return _port(port)
        if not (self._allows(host) or any(index.serves(host) for index in self._indexes)):
            return _unlisted(host)
        return Verdict(True, "tunnel")

    def judge(self, request: Request) -> Verdict:
        """Whether a request may go out."""
        try:
            if is_address(request.host):
                return _address(request.host)
            host = host_of(request.host)
            names = [split_authority(name) for name in request.names]
            other = [
                name
                for name, port in names
                if port not in (None, request.port) or host_of(name) != host
            ]
            read = readings(request.target)
        except BadUrl as error:
            return Verdict(False, "malformed", f"{error}.")
        if other:
            return Verdict(False, "other_host", f"a request to {host} names {other[0]!r}, too.")
        if PORTS.get(request.scheme) != request.port:
            return _port(request.port)
        if request.method not in _METHODS:
            return Verdict(False, "method", f"the method {request.method[:20]!r} is not let pass.")
        if not request.headers.isdisjoint(_SWITCHES):
            return Verdict(False, "protocol", "a request to change the protocol is not let pass.")
        if self._blocks.cover(host, read):
            return Verdict(False, "blocked", "the sandbox's policy blocks this URL.")
        if self._blocked_packages.cover(host, read):
            return Verdict(False, "blocked_package", "the sandbox's policy blocks this package.")
        if self._allows(host):
            return Verdict(True, "host")
        offered = any(all(i.offers(host, path) for path, _ in read) for i in self._indexes)
        if offered and request.method in ("GET", "HEAD"):
            return Verdict(True, "package")
        return _unlisted(host)

    def _allows(self, host: str) -> bool:
        return self._all or host in self._hosts or host.endswith(self._domains)


def _address(host: str) -> Verdict:
    return Verdict(False, "address", f"{host[:100]!r} is an address; hosts go by their names.")


def _port(port: int | None) -> Verdict:
    return Verdict(False, "port", f"port {port}: only 80 for http and 443 for https are let pass.")


def _unlisted(host: str) -> Verdict:
    return Verdict(False, "not_allowed", f"{host} is not among the hosts that are allowed.")
