"""A cluster to test against: a real API server and etcd from the cache, and a stub kubelet."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Json = dict[str, Any]

CACHE = Path(os.environ.get("KLONG_CACHE", Path.home() / ".cache/klong")) / "kubernetes/bin"
TOKEN = "administrator"
NAMESPACE = "klong-sandbox"
_HERE = Path(__file__).parent


def is_available() -> bool:
    """Whether this machine can have a cluster: launch/kubernetes_apiserver.sh builds the server."""
    programs = ("bwrap", "nsenter", "openssl")
    return (
        all((CACHE / name).exists() for name in ("etcd", "kube-apiserver"))
        and all(shutil.which(name) for name in programs)
        and find_spec("kubernetes") is not None
        and os.geteuid() == 0
    )


class Cluster:
    """The processes of a cluster; `close` ends them."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="klong-cluster-", dir="/tmp"))
        self.directory.chmod(0o711)
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        etcd_port, peer_port, self.port = _free_ports(3)
        etcd = f"http://127.0.0.1:{etcd_port}"
        peer = f"http://127.0.0.1:{peer_port}"
        self._etcd = etcd
        self._run(
            "etcd",
            str(CACHE / "etcd"),
            *("--data-dir", str(self.directory / "etcd-data"), "--unsafe-no-fsync"),
            *("--listen-client-urls", etcd, "--advertise-client-urls", etcd),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"default={peer}"),
        )
        key = self.directory / "accounts.key"
        subprocess.run(
            ["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True
        )
        (self.directory / "tokens").write_text(f"{TOKEN},administrator,1,system:masters\n")
        self.server = f"https://127.0.0.1:{self.port}"
        self.start_server()
        self.kubeconfig = self.directory / "kubeconfig"
        self.write_kubeconfig(self.kubeconfig, TOKEN)
        for namespace in ("default", NAMESPACE):
            self.make_namespace(namespace)
        certificates = self.directory / "certificates"
        self.kubelet = self._run(
            "kubelet",
            *(sys.executable, str(_HERE / "stub_kubelet.py"), self.server, TOKEN),
            *(str(certificates / "apiserver.crt"), str(certificates / "apiserver.key")),
            str(self.directory),
        )
        self._wait("the node", lambda: self.ask("GET", "/api/v1/nodes")["items"])

    def restart_server(self, *flags: str) -> None:
        """Kills the API server and starts it again."""
        self.api_server.kill()
        self.api_server.wait()
        self.start_server("--enable-priority-and-fairness=false", *flags)

    def start_server(self, *flags: str) -> None:
        """Starts the API server; `self.api_server` is its process."""
        key = str(self.directory / "accounts.key")
        self.api_server = self._run(
            "kube-apiserver",
            str(CACHE / "kube-apiserver"),
            *("--etcd-servers", self._etcd, "--service-cluster-ip-range", "10.0.0.0/24"),
            *("--secure-port", str(self.port), "--bind-address", "127.0.0.1"),
            *("--cert-dir", str(self.directory / "certificates")),
            *("--token-auth-file", str(self.directory / "tokens"), "--authorization-mode", "RBAC"),
            *("--service-account-issuer", "https://kubernetes.default.svc"),
            *("--service-account-key-file", key, "--service-account-signing-key-file", key),
            *("--enable-admission-plugins", "ResourceQuota,LimitRanger,ServiceAccount"),
            *flags,
        )
        self._wait("the API server", lambda: self.ask("GET", "/readyz", parse=False))

    def make_namespace(self, name: str) -> None:
        """Makes a namespace, with the account that a controller would make."""
        self._make("/api/v1/namespaces", name)
        self._wait("accounts", lambda: self._make(f"/api/v1/namespaces/{name}/serviceaccounts"))

    def _make(self, path: str, name: str = "default") -> bool:
        try:
            self.ask("POST", path, {"metadata": {"name": name}})
        except urllib.error.HTTPError as error:
            return error.code == 409
        return True

    def write_kubeconfig(self, path: Path, token: str) -> None:
        """Writes how to reach the cluster."""
        certificate = self.directory / "certificates/apiserver.crt"
        cluster = {"server": self.server, "certificate-authority": str(certificate)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        path.write_text(json.dumps(config))

    def ask(self, method: str, path: str, body: Json | None = None, *, parse: bool = True) -> Any:
        """A request as the administrator."""
        kind = "merge-patch+json" if method == "PATCH" else "json"
        request = urllib.request.Request(
            self.server + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": f"application/{kind}"},
        )
        context = ssl._create_unverified_context()
        with urllib.request.urlopen(request, context=context, timeout=20) as answer:
            text = answer.read()
        return json.loads(text) if parse else text

    def pods(self, namespace: str = NAMESPACE) -> list[Json]:
        """The pods of a namespace."""
        found: list[Json] = self.ask("GET", f"/api/v1/namespaces/{namespace}/pods")["items"]
        return found

    def _run(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "PYTHONPATH": str(_HERE.parents[1])}
        with open(self.directory / f"{name}.log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        self._processes.append(process)
        return process

    def _wait(self, what: str, holds: Any) -> None:
        deadline = time.monotonic() + 90
        while True:
            try:
                if holds():
                    return
            except (OSError, ssl.SSLError):
                pass
            if time.monotonic() > deadline:
                logs = sorted(self.directory.glob("*.log"))
                last = [f"{log.name}: {log.read_text()[-600:]}" for log in logs]
                raise RuntimeError(f"{what} is not ready\n" + "\n".join(last))
            time.sleep(0.1)

    def close(self) -> None:
        """Ends every process, the pods' before their API server's."""
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def make(state_dir: Path) -> Any:
    """A backend over a cluster of this process, for KLONG_SANDBOX_BACKEND."""
    from sandbox.backends.kubernetes.backend import KubernetesBackend
    from sandbox.backends.kubernetes.options import Options

    global _shared
    if _shared is None:
        _shared = Cluster()
        atexit.register(_shared.close)
    return KubernetesBackend(Options(kubeconfig=str(_shared.kubeconfig)), state_dir=state_dir)


_shared: Cluster | None = None
