"""The Kubernetes backend against a real API server and a stub kubelet.

The API server is built once by launch/kubernetes_apiserver.sh; without it nothing here is
collected.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from kubernetes_cluster import NAMESPACE, Cluster, Json
from sandbox_helpers import ROOT, in_box, sleepers, unique_sleep, wait_until

from sandbox.backends.kubernetes.api import Api
from sandbox.backends.kubernetes.backend import KubernetesBackend
from sandbox.backends.kubernetes.check import look
from sandbox.backends.kubernetes.options import Options
from sandbox.client import (
    Limits,
    Sandbox,
    SandboxClient,
    SandboxLost,
    SandboxRefused,
    SandboxSpec,
    SandboxUnavailable,
)
from sandbox.service import embedded

pytestmark = pytest.mark.kubernetes


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    try:
        yield made
    finally:
        made.close()


def _maps(cluster: Cluster) -> list[Json]:
    found = cluster.ask("GET", f"/api/v1/namespaces/{NAMESPACE}/configmaps")["items"]
    return [one for one in found if one["metadata"]["name"].startswith("klong-agent-")]


@pytest.fixture
def url(cluster: Cluster, state_dir: Path) -> Iterator[str]:
    options = Options(kubeconfig=str(cluster.kubeconfig))
    with embedded(KubernetesBackend(options, state_dir=state_dir)) as served:
        yield served
    assert cluster.pods() == [] and _maps(cluster) == []
    assert not list(state_dir.glob("*/*/sb-*"))


@contextmanager
def _serving(
    cluster: Cluster, state_dir: Path, *, port: int = 0, kubeconfig: Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "sandbox", "serve", "--backend", "kubernetes"]
    command += ["--port", str(port), "--state-dir", str(state_dir)]
    command += ["--kubeconfig", str(kubeconfig or cluster.kubeconfig)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        yield process, found[0]
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_sandbox_is_a_pod_that_may_do_nothing_else(cluster: Cluster, url: str) -> None:
    async def body(box: Sandbox) -> None:
        (pod,) = cluster.pods()
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        assert pod["metadata"]["labels"]["klong.sandbox"] == box.id
        assert pod["metadata"]["labels"]["klong.network"] == "none"
        assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
        assert (spec["restartPolicy"], spec["activeDeadlineSeconds"]) == ("Never", 530)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        rights = container["securityContext"]
        assert rights["capabilities"] == {"drop": ["ALL"]} and rights["readOnlyRootFilesystem"]
        assert rights["allowPrivilegeEscalation"] is rights["privileged"] is False
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert container["resources"]["limits"]["ephemeral-storage"] == "50M"
        assert next(v for v in spec["volumes"] if v["name"] == "data")["emptyDir"] == {
            "sizeLimit": "50M"
        }
        inside = await box.exec(
            "id -un; pwd; grep -c . /etc/passwd; ls /var/run/secrets 2>&1; "
            "grep -E '^(Seccomp|NoNewPrivs|CapBnd):' /proc/self/status; touch /usr/x"
        )
        assert inside.stdout.startswith("agent\n/workspace\n2\n"), inside
        assert "CapBnd:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n" in inside.stdout
        assert "No such file" in inside.stdout and "Read-only file system" in inside.stderr
        async with await box.session() as session:
            await session.run("cd /tmp; A=1")
            assert (await session.run("echo $A; pwd")).stdout == "1\n/tmp\n"
        data = os.urandom(3_000_000)
        await box.write("deep/er/file", data)
        assert await box.read("deep/er/file") == data
        # What the line had to be opened for again is not lost, nor done twice.
        running = asyncio.create_task(box.exec("echo once >>log; sleep 1; cat log"))
        while not (await box.exec("cat log")).stdout:
            pass
        killed = await box.exec("pkill -9 -f '[b]ridge.py'")
        assert (await running).stdout == "once\n" and killed.exit_code == 0

    limits = Limits(disk_mb=50)
    in_box(url, body, SandboxSpec(limits=limits, lifetime_s=500))


_POSE = """
import socket
line = socket.socket(socket.AF_UNIX)
line.connect('\\0klong-agent')
line.send(b'\\0')
try:
    print(line.recv(100) or 'refused')
except OSError:
    print('refused')
try:
    socket.socket(socket.AF_UNIX).bind('\\0klong-agent')
except OSError as error:
    print(error.strerror)
"""


def test_no_command_poses_as_the_bridge_or_as_the_agent(url: str) -> None:
    async def body(box: Sandbox) -> None:
        posed = await box.exec("python3 -", stdin=_POSE)
        assert posed.stdout == "refused\nAddress already in use\n", posed
        traced = "import ctypes; print(ctypes.CDLL(None).ptrace(16, 1, 0, 0))"
        assert (await box.exec("python3 -", stdin=traced)).stdout == "-1\n"
        assert (await box.exec("echo works")).stdout == "works\n"

    in_box(url, body)


def test_what_the_cluster_refuses_is_told_with_its_remedy(cluster: Cluster, url: str) -> None:
    async def main() -> None:
        async with SandboxClient(url) as client:
            with pytest.raises(SandboxRefused, match=r"image: the cluster cannot pull it: .*none"):
                await client.create(SandboxSpec(image="none"))
            with pytest.raises(SandboxRefused, match=r"limits.inodes"):
                await client.create(SandboxSpec(limits=Limits(disk_mb=50, inodes=500)))
            path = f"/api/v1/namespaces/{NAMESPACE}/resourcequotas"
            quota = {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
            cluster.ask("POST", path, quota)
            # A controller would say this.
            told = {"status": {"hard": {"pods": "0"}, "used": {"pods": "0"}}}
            cluster.ask("PATCH", f"{path}/none/status", told)
            try:
                with pytest.raises(SandboxUnavailable, match=r"quota .* used up: .*; close sandb"):
                    async with asyncio.timeout(20):
                        while True:  # Until the server has heard of the quota.
                            await (await client.create()).close()
            finally:
                cluster.ask("DELETE", f"{path}/none")
        assert cluster.pods() == []

    asyncio.run(main())


def test_a_runtime_class_is_taken_or_refused(cluster: Cluster, state_dir: Path) -> None:
    async def body(box: Sandbox) -> None:
        (pod,) = cluster.pods()
        assert pod["spec"]["runtimeClassName"] == "gvisor"
        assert (await box.exec("echo in")).stdout == "in\n"

    options = Options(kubeconfig=str(cluster.kubeconfig), runtime_class="gvisor")
    with embedded(KubernetesBackend(options, state_dir=state_dir)) as url:
        with pytest.raises(SandboxRefused, match=r"not admit the pod: .*gvisor"):
            in_box(url, body)
        made = {"metadata": {"name": "gvisor"}, "handler": "runsc"}
        cluster.ask("POST", "/apis/node.k8s.io/v1/runtimeclasses", made)
        assert wait_until(lambda: not asyncio.run(_refused(url)), timeout_s=10)
        in_box(url, body)
    rows = asyncio.run(look(options))
    assert [row[1] for row in rows] == ["v1.20.2", "allowed", "runsc"]


async def _refused(url: str) -> bool:
    async with SandboxClient(url) as client:
        try:
            await (await client.create()).close()
        except SandboxRefused:
            return True
    return False


def test_a_killed_service_leaves_what_the_next_adopts(cluster: Cluster, state_dir: Path) -> None:
    argument = unique_sleep()

    async def first(url: str, service: subprocess.Popen[str]) -> tuple[str, asyncio.Task[str]]:
        client = SandboxClient(url, reconnect_s=60)
        box = await client.create(SandboxSpec(labels={"task": "t"}))
        session = await box.session("work")
        await session.run(f"cd /tmp; C=3; sleep {argument} &")

        async def work() -> str:
            done = await box.exec("echo once >>log; sleep 2; cat log")
            await client.close()
            return done.stdout

        running = asyncio.create_task(work())
        while not (await box.exec("cat log")).stdout:
            pass
        service.kill()
        service.wait()
        return box.id, running

    async def main() -> None:
        with _serving(cluster, state_dir) as (killed, url):
            sandbox_id, running = await first(url, killed)
        port = int(url.rpartition(":")[2])
        with _serving(cluster, state_dir, port=port) as (again, url):
            assert await running == "once\n"
            async with SandboxClient(url) as client:
                assert [info.id for info in await client.list()] == [sandbox_id]
                session = (await client.attach(sandbox_id)).attach_session("work")
                assert (await session.run("echo $C; pwd")).stdout == "3\n/tmp\n"
                assert sleepers(argument)
                again.terminate()
                assert await asyncio.to_thread(again.wait, 30) == 0
        assert cluster.pods() == [] and _maps(cluster) == []
        assert await asyncio.to_thread(wait_until, lambda: not sleepers(argument))

    asyncio.run(main())


def test_what_nobody_knows_any_more_is_found_by_its_label(
    cluster: Cluster, state_dir: Path
) -> None:
    async def leave() -> None:
        with _serving(cluster, state_dir) as (killed, url):
            async with SandboxClient(url) as client:
                await client.create()
                killed.send_signal(signal.SIGKILL)
                killed.wait()

    asyncio.run(leave())
    assert len(cluster.pods()) == len(_maps(cluster)) == 1
    (left,) = state_dir.glob("kubernetes/*/sb-*")
    left.rmdir()
    with _serving(cluster, state_dir) as (again, _):
        assert cluster.pods() == []
        assert len(_maps(cluster)) == 1, "the map of the dead service is gone, that of this one not"
        again.terminate()
        assert again.wait(60) == 0
    assert _maps(cluster) == []


def test_a_deleted_pod_is_a_lost_sandbox(cluster: Cluster, url: str) -> None:
    async def body(box: Sandbox) -> None:
        running = asyncio.create_task(box.exec("sleep 60"))
        await box.exec("true")
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{box.id}"
        cluster.ask("DELETE", path, {"gracePeriodSeconds": 0})
        with pytest.raises(SandboxLost, match="deleted by another"):
            await running

    in_box(url, body)


def test_the_manifests_are_accepted_and_their_rights_suffice(
    cluster: Cluster, state_dir: Path
) -> None:
    groups = {
        "v1": "/api/v1",
        "apps/v1": "/apis/apps/v1",
        "rbac.authorization.k8s.io/v1": "/apis/rbac.authorization.k8s.io/v1",
        "networking.k8s.io/v1": "/apis/networking.k8s.io/v1",
    }
    names = ("namespace", "account", "limits", "network", "service")
    made: list[str] = []
    for name in names:
        for one in yaml.safe_load_all((ROOT / f"launch/kubernetes/{name}.yaml").read_text()):
            plural = one["kind"].lower().removesuffix("y") + "s"
            plural = plural.replace("networkpolics", "networkpolicies")
            if one["kind"] == "Namespace":
                cluster.ask("PATCH", f"/api/v1/namespaces/{NAMESPACE}", one)
                continue
            path = f"{groups[one['apiVersion']]}/namespaces/{NAMESPACE}/{plural}"
            cluster.ask("POST", path, one)
            made.append(f"{path}/{one['metadata']['name']}")
            if one["kind"] == "ResourceQuota":
                hard = one["spec"]["hard"]
                told = {"status": {"hard": hard, "used": dict.fromkeys(hard, "0")}}
                cluster.ask("PATCH", f"{made[-1]}/status", told)
    account = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/klong-sandbox-service"
    asked = {"spec": {"audiences": ["https://kubernetes.default.svc"], "expirationSeconds": 3600}}
    token = cluster.ask("POST", f"{account}/token", asked)["status"]["token"]
    kubeconfig = cluster.directory / "service.kubeconfig"
    cluster.write_kubeconfig(kubeconfig, token)
    options = Options(kubeconfig=str(kubeconfig))
    assert asyncio.run(look(options))[1][1] == "allowed"

    async def body(box: Sandbox) -> None:
        assert (await box.exec("echo in")).stdout == "in\n"

    with embedded(KubernetesBackend(options, state_dir=state_dir), pool=1) as url:
        in_box(url, body)
    elsewhere = Options(kubeconfig=str(kubeconfig), namespace="default")
    with (
        pytest.raises(SandboxUnavailable, match=r"launch/kubernetes/account\.yaml"),
        embedded(KubernetesBackend(elsewhere, state_dir=state_dir / "other")),
    ):
        pass
    for path in made:
        cluster.ask("DELETE", path)
    assert cluster.pods() == []


def test_a_server_that_says_wait_is_waited_for_and_one_that_restarts_loses_nothing(
    cluster: Cluster, state_dir: Path
) -> None:
    async def throttled(kubeconfig: Path) -> int:
        api = await Api.connect(str(kubeconfig), at_once=16)
        try:
            path = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
            async with asyncio.timeout(20):
                while True:  # Until the server has heard of the role.
                    with suppress(SandboxUnavailable):
                        await api.request("GET", path)
                        break
            answers = await asyncio.gather(*(api.request("GET", path) for _ in range(60)))
            assert len(answers) == 60 and all("items" in answer for answer in answers)
            return api.throttled
        finally:
            await api.close()

    async def body(box: Sandbox) -> None:
        running = asyncio.create_task(box.exec("echo once >>log; sleep 3; cat log"))
        while not (await box.exec("cat log")).stdout:
            pass
        await asyncio.to_thread(cluster.restart_server, "--max-requests-inflight=1")
        assert (await running).stdout == "once\n"
        assert (await box.exec("cat log")).stdout == "once\n"

    options = Options(kubeconfig=str(cluster.kubeconfig))
    with embedded(KubernetesBackend(options, state_dir=state_dir)) as url:
        in_box(url, body)
    # Administrators are let pass; others hear 429 when two ask at once.
    made = {"metadata": {"name": "anyone"}}
    accounts = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts"
    cluster.ask("POST", accounts, made)
    asked: Json = {"spec": {"audiences": ["https://kubernetes.default.svc"]}}
    token = cluster.ask("POST", f"{accounts}/anyone/token", asked)["status"]["token"]
    binding = {
        "metadata": {"name": "anyone"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "anyone"},
        "subjects": [{"kind": "ServiceAccount", "name": "anyone", "namespace": NAMESPACE}],
    }
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}"
    rule = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list"]}
    cluster.ask("POST", f"{path}/roles", {**made, "rules": [rule]})
    cluster.ask("POST", f"{path}/rolebindings", binding)
    kubeconfig = cluster.directory / "anyone.kubeconfig"
    cluster.write_kubeconfig(kubeconfig, token)
    assert asyncio.run(throttled(kubeconfig)) > 0
