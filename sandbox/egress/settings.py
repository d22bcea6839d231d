"""What the operator of a service says about egress, and what a sandbox is told of it."""

from __future__ import annotations

import os
import shutil
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from sandbox.backends.base import RELAY_PORT
from sandbox.egress.packages import NPM, PYPI
from sandbox.egress.urls import host_of, split_authority
from sandbox.errors import SandboxRefused
from sandbox.owner import ENGINE_UID
from sandbox.spec import STRICT, Egress

CERTIFICATE = "ca.pem"
"""The authority's certificate, in the directory of the service's socket."""

_DEBIAN_AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"


def _place(text: str) -> tuple[str, int | None]:
    """Address and port.

    Raises:
        ValueError: it is none.
    """
    host, port = split_authority(text)
    return str(ip_address(host.strip("[]"))), port


def _check_place(text: str) -> str:
    _place(text)
    return text


_Place = Annotated[str, AfterValidator(_check_place)]


@dataclass(frozen=True)
class EgressSettings:
    """How a service lets sandboxes out.

    Attributes:
        hosts: Names that are not looked up, with their `ADDRESS[:PORT]`; unlike others these may
            lie in a private network, such as a mirror's.
        pypi: The simple index that `packages` offers.
        npm: The npm registry that it offers.
        python: The interpreter that has mitmproxy; None is the one that `install-egress` makes.
        trusted: File of the certificates that upstream servers are trusted by; None is the host's.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    hosts: Mapping[Annotated[str, AfterValidator(host_of)], _Place] = field(default_factory=dict)
    pypi: str = PYPI
    npm: str = NPM
    python: Path | None = None
    trusted: Path | None = None

    @staticmethod
    def read(path: Path) -> EgressSettings:
        """Reads them from a file of JSON.

        Raises:
            SandboxRefused: it cannot be read, or holds something else.
        """
        try:
            return TypeAdapter(EgressSettings).validate_json(path.read_bytes())
        except OSError as error:
            raise SandboxRefused(f"egress settings {path}: {error.strerror}.") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise SandboxRefused(f"egress settings {path}: {place}: {first['msg']}.") from None

    def for_engine(self, directory: Path) -> dict[str, Any]:
        """What the engine is started with.

        Args:
            directory: Where its authority and its audit are.
        """
        usual = (ssl.get_default_verify_paths().cafile, _DEBIAN_AUTHORITIES)
        trusted = self.trusted or next((f for f in usual if f and os.path.exists(f)), None)
        if trusted is not None:
            # Where the engine's user can read it.
            shutil.copyfile(trusted, directory / "trusted.pem")
            (directory / "trusted.pem").chmod(0o644)
        return {
            "directory": str(directory),
            "hosts": {name: _place(to) for name, to in self.hosts.items()},
            "pypi": self.pypi,
            "npm": self.npm,
            "trusted": None if trusted is None else str(directory / "trusted.pem"),
            "user": ENGINE_UID if os.geteuid() == 0 else None,
        }

    def environment(self, egress: Egress, line: str) -> dict[str, str]:
        """Variables by which programs of a sandbox find the way out.

        Args:
            egress: What the sandbox was asked to have.
            line: The directory of the service's sockets, as the sandbox sees it.
        """
        relay, certificate = f"http://127.0.0.1:{RELAY_PORT}", f"{line}/{CERTIFICATE}"
        env = {"NO_PROXY": "localhost,127.0.0.1,::1", "NODE_USE_ENV_PROXY": "1"}
        env |= {name: relay for name in ("HTTP_PROXY", "HTTPS_PROXY")}
        env |= {name.lower(): env[name] for name in ("NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY")}
        env |= {name: certificate for name in _CERTIFICATE_VARIABLES}
        if "pypi" in egress.packages:
            index = f"{self.pypi.rstrip('/')}/"
            env |= {"PIP_INDEX_URL": index, "UV_DEFAULT_INDEX": index}
        if "npm" in egress.packages:
            env |= {"NPM_CONFIG_REGISTRY": f"{self.npm.rstrip('/')}/"}
            env |= {"NPM_CONFIG_CAFILE": certificate}
        return env


_CERTIFICATE_VARIABLES = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
    "PIP_CERT",
    "CARGO_HTTP_CAINFO",
)
