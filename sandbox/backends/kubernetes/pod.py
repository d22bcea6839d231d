"""The pod of a sandbox: what it may use, and everything it may not do."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from typing import Any

from sandbox.api import SandboxInfo
from sandbox.backends import seccomp
from sandbox.backends.base import AGENT_DIR, agent_arguments, agent_code
from sandbox.backends.bubblewrap import ENV, users
from sandbox.backends.kubernetes.options import Options
from sandbox.errors import SandboxRefused
from sandbox.spec import MB, Limits

CONTAINER = "sandbox"

# Whose pod it is: the sandbox, the service that made it, and that service's state directory.
SANDBOX, OWNER, STATE = "klong.sandbox", "klong.owner", "klong.state"
# The manifests' network policies go by it.
NETWORK = "klong.network"

# The agent ends the pod first; this is for one that cannot.
_LATE_S = 30

# Seconds that an agent whose service is not durable waits for a stream that broke.
_PATIENCE_S = 60.0

_MACHINES = ("x86_64", "aarch64")
_FILTERS = "/run/klong/filters"

# Becomes the agent with the limits that Kubernetes has no words for. dash says -p for bash's -u.
# The user is this pod's alone, so that its processes are counted, whatever else the node runs.
_SETUP = (
    "ulimit -c 0; ulimit -f {blocks}; ulimit -n {files}; "
    'if [ "$BASH_VERSION" ]; then ulimit -u {pids}; else ulimit -p {pids}; fi; '
    'exec "$@"'
)

BRIDGE = ["python3", "-ISB", f"{AGENT_DIR}/sandbox/agent/bridge.py"]


def agent_map(name: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """The ConfigMap with the agent's code and its system-call filters.

    Its files lie in directories, which keys cannot name; `_agent_volume` puts them there.
    """
    files = agent_code()
    files["__main__.py"] = files["sandbox/agent/__main__.py"]
    return {
        "metadata": {"name": name, "labels": dict(labels)},
        "immutable": True,
        "data": {_key(path): text for path, text in files.items()},
        "binaryData": {machine: _base64(seccomp.bpf(machine)) for machine in _MACHINES},
    }


def map_name(owner: str) -> str:
    """The name of a service's ConfigMap."""
    return f"klong-agent-{hashlib.sha256(owner.encode()).hexdigest()[:12]}"


def pod(
    name: str,
    info: SandboxInfo,
    options: Options,
    *,
    uid: int,
    labels: Mapping[str, str],
    agent: str,
    lives_s: float | None,
    durable: bool,
) -> dict[str, Any]:
    """The manifest of a sandbox's pod.

    Args:
        name: Of the pod.
        info: The sandbox.
        options: Of the backend.
        uid: User of its processes, of no other pod.
        labels: Whose it is.
        agent: ConfigMap of the agent's code.
        lives_s: Seconds after which the cluster ends it; None leaves that to the agent.
        durable: Whether it outlives its service.

    Raises:
        SandboxRefused: the spec asks what no cluster can hold.
    """
    spec, limits = info.spec, info.spec.limits
    if limits.inodes is not None:
        raise SandboxRefused("limits.inodes: Kubernetes counts no inodes; leave it out.")
    if spec.egress is not None:
        raise SandboxRefused("egress: the Kubernetes backend has no proxy; use a local service.")
    setup = _SETUP.format(
        blocks=limits.files_mb * MB // 512, files=limits.open_files, pids=limits.pids
    )
    python = ["python3", "-ISB", f"{AGENT_DIR}/__main__.py"]
    start = agent_arguments(python, "", info, durable=durable, patience_s=_PATIENCE_S)
    resources = _resources(limits)
    container = {
        "name": CONTAINER,
        "image": spec.image or options.image,
        "command": ["/bin/sh", "-c", setup, "sh", *start, _FILTERS],
        "workingDir": "/workspace",
        "env": [{"name": key, "value": text} for key, text in ENV.items() if key != "PATH"],
        "resources": {"limits": resources, "requests": resources},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            *_mounts("data", {"workspace": "/workspace", "home": ENV["HOME"], "tmp": "/tmp"}),
            *_mounts("users", {"passwd": "/etc/passwd", "group": "/etc/group"}, read_only=True),
            {"name": "agent", "mountPath": AGENT_DIR, "readOnly": True},
            {"name": "filters", "mountPath": _FILTERS, "readOnly": True},
        ],
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    content: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "serviceAccountName": options.service_account,
        "enableServiceLinks": False,
        "hostname": "sandbox",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": uid,
            "runAsGroup": uid,
            "fsGroup": uid,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "data", "emptyDir": _size(limits)},
            _users_volume(uid),
            _agent_volume(agent),
            _filters_volume(agent),
        ],
    }
    if not spec.network:
        # Policies of the network keep it in; it need not even know whom to ask.
        content |= {"dnsPolicy": "None", "dnsConfig": {"nameservers": ["127.0.0.1"]}}
    if options.runtime_class is not None:
        content["runtimeClassName"] = options.runtime_class
    if lives_s is not None:
        content["activeDeadlineSeconds"] = deadline_s(lives_s)
    return {
        "metadata": {
            "name": name,
            "labels": {**labels, NETWORK: "open" if spec.network else "none"},
            "annotations": {f"klong/{file}": text for file, text in users(uid).items()},
        },
        "spec": content,
    }


def deadline_s(lives_s: float) -> int:
    """What the cluster is told of the seconds that a pod lives."""
    return min(math.ceil(lives_s) + _LATE_S, 2**31 - 1)


def _resources(limits: Limits) -> dict[str, str]:
    found = {"cpu": f"{math.ceil(limits.cpus * 1000)}m", "memory": str(limits.memory_mb * MB)}
    if limits.disk_mb is not None:
        found["ephemeral-storage"] = str(limits.disk_mb * MB)
    return found


def _size(limits: Limits) -> dict[str, str]:
    return {} if limits.disk_mb is None else {"sizeLimit": str(limits.disk_mb * MB)}


def _mounts(
    volume: str, places: Mapping[str, str], *, read_only: bool = False
) -> list[dict[str, Any]]:
    return [
        {"name": volume, "subPath": name, "mountPath": path, "readOnly": read_only}
        for name, path in places.items()
    ]


def _users_volume(uid: int) -> dict[str, Any]:
    """/etc/passwd and /etc/group, from the pod's own annotations: no object of their own."""
    items = [
        {"path": file, "fieldRef": {"fieldPath": f"metadata.annotations['klong/{file}']"}}
        for file in users(uid)
    ]
    return {"name": "users", "downwardAPI": {"items": items, "defaultMode": 0o444}}


def _agent_volume(agent: str) -> dict[str, Any]:
    items = [{"key": _key(path), "path": path} for path in (*agent_code(), "__main__.py")]
    return {"name": "agent", "configMap": {"name": agent, "items": items, "defaultMode": 0o444}}


def _filters_volume(agent: str) -> dict[str, Any]:
    items = [{"key": machine, "path": machine} for machine in _MACHINES]
    return {"name": "filters", "configMap": {"name": agent, "items": items, "defaultMode": 0o444}}


def _key(path: str) -> str:
    return path.replace("/", ".")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
