"""Which cluster, and what every pod of it is like."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sandbox.errors import SandboxRefused

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


@dataclass(frozen=True)
class Options:
    """What the Kubernetes backend is told.

    Attributes:
        namespace: Where its pods are.
        runtime_class: RuntimeClass of the pods, such as one of gVisor or Kata; None is the
            cluster's default, usually runc, which shares the node's kernel.
        kubeconfig: File that says how to reach the cluster; None is the pod's own account inside a
            cluster, elsewhere `$KUBECONFIG` or ~/.kube/config.
        image: Image of sandboxes that name none.
        service_account: Account of the pods; its token is never mounted.
        requests_at_once: Requests to the API server that are under way together.
    """

    namespace: str = "klong-sandbox"
    runtime_class: str | None = None
    kubeconfig: str | None = None
    image: str = "klong/base:bookworm"
    service_account: str = "default"
    requests_at_once: int = 16

    def __post_init__(self) -> None:
        """Refuses what can be no name in a cluster."""
        for field in ("namespace", "runtime_class", "service_account"):
            name = getattr(self, field)
            if name is not None and not _NAME.fullmatch(name):
                raise SandboxRefused(
                    f"{field}: {name!r} is no name in Kubernetes; take small letters, digits, '-'."
                )
