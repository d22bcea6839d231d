"""A server that stands for the hosts of the internet, allowed and blocked, with TLS and without."""

from __future__ import annotations

import io
import json
import os
import socket
import ssl
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sandbox.egress import install
from sandbox.egress.settings import EgressSettings

HOSTS = (
    "open.example",
    "github.com",
    "www.github.com",
    "raw.githubusercontent.com",
    "media.githubusercontent.com",
    "api.github.com",
    "codeload.github.com",
    "pypi.org",
    "files.pythonhosted.org",
)


def require_egress() -> None:
    """Skips where the engine is not installed; in CI, which installs it, fails."""
    if not install.is_complete():
        said = f"no egress engine: {install.REMEDY}"
        if os.environ.get("CI") == "true":
            pytest.fail(said)
        pytest.skip(said)


def _wheel() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as wheel:
        wheel.writestr("demo.py", "WORD = 'from the index'\n")
        info = "demo-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")
    return out.getvalue()


_FILE = "/packages/aa/demo-1.0-py3-none-any.whl"
_PAGES = {
    "/simple/demo/": f'<a href="https://files.pythonhosted.org{_FILE}">{_FILE[13:]}</a>'.encode(),
    _FILE: _wheel(),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, _Upstream)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"{self.headers['Host']}{self.path}")
        body = _PAGES.get(self.path)
        if body is None:
            names = sorted(name.lower() for name in self.headers)
            body = json.dumps({"path": self.path, "headers": names}).encode()
        self.send_response(302 if self.path == "/redirect" else 200)
        if self.path == "/redirect":
            self.send_header("Location", "https://github.com/org/%2573ecret")
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_args: Any) -> None:
        pass


class _Upstream(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, certificate: Path, key: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate, key)

    def finish_request(self, request: Any, client_address: Any) -> None:
        if request.recv(1, socket.MSG_PEEK) == b"\x16":
            request = self._tls.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)

    def handle_error(self, *_args: Any) -> None:
        """A client that goes away is none."""


@contextmanager
def upstream(directory: Path) -> Iterator[tuple[EgressSettings, list[str]]]:
    """Serves all `HOSTS`; yields settings by which they are found, and what they are asked."""
    certificate, key = directory / "upstream.pem", directory / "upstream.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=upstream", "-out", str(certificate)]
    command += ["-keyout", str(key), "-addext"]
    command += ["subjectAltName=" + ",".join(f"DNS:{host}" for host in HOSTS)]
    subprocess.run(command, check=True, capture_output=True)
    server = _Upstream(certificate, key)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    to = f"127.0.0.1:{server.server_address[1]}"
    try:
        yield EgressSettings(hosts=dict.fromkeys(HOSTS, to), trusted=certificate), server.asked
    finally:
        server.shutdown()
        server.server_close()
