"""What a cluster can do for sandboxes, for `doctor`."""

from __future__ import annotations

import asyncio

from sandbox.backends.kubernetes.api import Api
from sandbox.backends.kubernetes.options import Options
from sandbox.errors import SandboxError

_PATIENCE_S = 10.0

# What the role of launch/kubernetes/account.yaml allows: resource, subresource, verbs.
_RIGHTS = (
    ("pods", "", ("create", "delete", "get", "list", "patch", "watch")),
    ("pods", "exec", ("create", "get")),
    ("configmaps", "", ("create", "delete", "get", "list")),
)

# What was looked for, what is there, and what that means.
Row = tuple[str, str, str]


async def look(options: Options) -> list[Row]:
    """Looks at the cluster that a service with these options would use."""
    without = "backend=kubernetes cannot be used"
    try:
        api = await Api.connect(options.kubeconfig, at_once=options.requests_at_once)
    except SandboxError as error:
        return [("kubernetes", "", f"No cluster is configured, so {without}: {error}")]
    try:
        async with asyncio.timeout(_PATIENCE_S):
            version = str((await api.request("GET", "/version"))["gitVersion"])
            rows = [("kubernetes", version, "backend=kubernetes runs sandboxes as pods.")]
            rows.append(await _rights(api, options))
            if options.runtime_class is not None:
                rows.append(await _runtime_class(api, options.runtime_class))
            return rows
    except TimeoutError:
        return [("kubernetes", "", f"{api.server} does not answer: {without}.")]
    except SandboxError as error:
        return [("kubernetes", "", f"{error} So {without}.")]
    finally:
        await api.close()


async def _rights(api: Api, options: Options) -> Row:
    lacking = []
    for resource, subresource, verbs in _RIGHTS:
        for verb in verbs:
            asked = {"namespace": options.namespace, "verb": verb, "resource": resource}
            if subresource:
                asked["subresource"] = subresource
            review = {"spec": {"resourceAttributes": asked}}
            path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
            if not (await api.request("POST", path, review))["status"]["allowed"]:
                lacking.append(f"{verb} {'/'.join(filter(None, (resource, subresource)))}")
    name = f"namespace {options.namespace}"
    if lacking:
        said = "Apply launch/kubernetes/account.yaml; the account may not"
        return (name, "", f"{said} {', '.join(lacking)}.")
    return (name, "allowed", "The account may make pods there and talk to them.")


async def _runtime_class(api: Api, name: str) -> Row:
    try:
        found = await api.request("GET", f"/apis/node.k8s.io/v1/runtimeclasses/{name}")
    except SandboxError as error:
        return (f"runtime class {name}", "", f"Pods that ask for it are refused: {error}")
    return (f"runtime class {name}", str(found["handler"]), "Pods run by that handler.")
