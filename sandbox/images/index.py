"""Where pip looks while an image is built: where this host's own pip looks.

What lies in directories of this host (wheels, a mirror) is served to the build, by loopback and
under a name that nobody else knows, for as long as it lasts: so it takes no space in the image.
"""

from __future__ import annotations

import ast
import os
import secrets
import ssl
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sandbox.errors import SandboxRefused

TORCH = "https://download.pytorch.org/whl/cpu"
"""The index of PyTorch's builds without CUDA."""

_PATIENCE_S = 5.0
# Settings of pip that a build takes over.
_PLACES = ("index-url", "extra-index-url", "find-links")
_FLAGS = ("no-index", "trusted-host", "default-timeout")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")


@contextmanager
def offered(*, torch: bool) -> Iterator[dict[str, str]]:
    """Serves this host's directories of packages; yields the build's arguments.

    Args:
        torch: Whether to look in PyTorch's own index, too, where it can be reached.

    Raises:
        SandboxRefused: pip is told of a place that is not there.
    """
    settings = _host_settings()
    with _serving() as serve:
        arguments = {
            _variable(name): " ".join(
                _seen_inside(place, serve) for place in settings[name].split()
            )
            for name in _PLACES
            if settings.get(name)
        }
        arguments |= {_variable(name): settings[name] for name in _FLAGS if settings.get(name)}
        if torch and not settings.get("no-index") and _reachable(TORCH):
            extra = _variable("extra-index-url")
            arguments[extra] = f"{arguments.get(extra, '')} {TORCH}".strip()
        for name in _PROXIES:
            if name in os.environ:
                arguments[name] = os.environ[name]
        if arguments.keys() & set(_PROXIES):
            besides = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
            arguments["no_proxy"] = arguments["NO_PROXY"] = f"{besides},127.0.0.1".lstrip(",")
        yield arguments


def certificates() -> bytes | None:
    """Those that this host trusts, for it may reach the index through a proxy of its own."""
    for path in (
        _host_settings().get("cert"),
        os.environ.get("SSL_CERT_FILE"),
        ssl.get_default_verify_paths().cafile,
    ):
        if path and os.path.isfile(path):
            return Path(path).read_bytes()
    return None


def _variable(name: str) -> str:
    return "PIP_" + name.upper().replace("-", "_")


def _host_settings() -> dict[str, str]:
    """The settings of this host's pip; what the environment says goes before its files."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    settings = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in ("global", "install"):
            settings[name] = str(ast.literal_eval(value))
    for name in (*_PLACES, *_FLAGS, "cert"):
        if said := os.environ.get(_variable(name)):
            settings[name] = said
    return settings


def _reachable(url: str) -> bool:
    try:
        request = urllib.request.Request(f"{url}/", method="HEAD")
        urllib.request.urlopen(request, timeout=_PATIENCE_S).close()
    except OSError:
        return False
    return True


class _Shelf:
    """Directories that are served, each under a number."""

    def __init__(self) -> None:
        self.roots: list[Path] = []
        self.secret = secrets.token_hex(16)
        self.url = ""

    def offer(self, root: Path) -> str:
        """Serves a directory, too; returns its URL."""
        self.roots.append(root.resolve())
        return f"{self.url}/{self.secret}/{len(self.roots) - 1}/"

    def path(self, asked: str) -> str:
        """The file that a request means; one that is not there if it means none."""
        parts = urllib.parse.unquote(asked.partition("?")[0]).strip("/").split("/")
        if len(parts) >= 2 and secrets.compare_digest(parts[0].encode(), self.secret.encode()):
            root = (
                self.roots[int(parts[1])] if parts[1] in map(str, range(len(self.roots))) else None
            )
            if root is not None:
                path = root.joinpath(*parts[2:]).resolve()
                if path.is_relative_to(root):
                    # Directories are told from files by the slash at their end.
                    return f"{path}/" if asked.endswith("/") else str(path)
        return os.devnull + "/none"


@contextmanager
def _serving() -> Iterator[_Shelf]:
    shelf = _Shelf()

    class Handler(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            return shelf.path(path)

        def log_message(self, format: str, *args: Any) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        shelf.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, name="wheels", daemon=True)
        thread.start()
        try:
            yield shelf
        finally:
            server.shutdown()
            thread.join()


def _seen_inside(place: str, shelf: _Shelf) -> str:
    """A place of packages as the build reaches it."""
    scheme, _, rest = place.partition("://")
    if rest and scheme != "file":
        return place
    path = Path(urllib.parse.unquote(urllib.parse.urlsplit(place).path) if rest else place)
    if not path.is_dir():
        raise SandboxRefused(f"pip is told to look in {path}, which is no directory.")
    if rest:
        # The pages of a mirror name the files beside them.
        return f"{shelf.offer(path.parent)}{path.name}"
    return shelf.offer(path)
