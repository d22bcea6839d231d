"""A small kubelet and scheduler: registers a node, runs its pods under bubblewrap, serves exec.

    python stub_kubelet.py SERVER TOKEN CERTIFICATE KEY ROOT

What stands in for a container runtime is bubblewrap with the host's /usr as the only image there
is; everything else of a pod that the Kubernetes backend relies on is real: volumes of a ConfigMap,
of annotations and of the disk, sub-paths, user, limits by control groups, deadline, status, and
`pods/exec` by the WebSocket protocol that an API server hands through to a kubelet.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import ssl
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from sandbox.backends import bubblewrap, cgroups
from sandbox.spec import MB, Limits

NODE = "stub"
IMAGES = ("klong/base:bookworm",)
PATH = "/usr/local/bin:/usr/bin:/bin"

Json = dict[str, Any]


class Api:
    """Requests to the API server, as a cluster's administrator."""

    def __init__(self, server: str, token: str) -> None:
        self.server = server
        self.session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {token}"},
            connector=aiohttp.TCPConnector(ssl=False, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=1 << 22,
        )

    async def ask(self, method: str, path: str, body: Json | None = None) -> Json:
        kind = "merge-patch+json" if method == "PATCH" else "json"
        headers = {"Content-Type": f"application/{kind}"}
        async with self.session.request(
            method, self.server + path, json=body, headers=headers
        ) as answer:
            said: Json = await answer.json()
            if answer.status >= 400:
                raise RuntimeError(f"{method} {path}: {answer.status} {said.get('message')}")
            return said


class Pod:
    """One pod of this node."""

    def __init__(self, api: Api, root: Path, manifest: Json) -> None:
        self.api, self.manifest = api, manifest
        self.name: str = manifest["metadata"]["name"]
        self.uid: str = manifest["metadata"]["uid"]
        self.path = f"/api/v1/namespaces/{manifest['metadata']['namespace']}/pods/{self.name}"
        self.container: Json = manifest["spec"]["containers"][0]
        self.directory = root / self.uid
        self.groups: list[Path] = []
        self.process: asyncio.subprocess.Process | None = None
        self.first = 0
        self.started = ""
        self.gone = False
        self.reason = ""

    @property
    def user(self) -> list[str]:
        """The command prefix that becomes the pod's user, without any capability."""
        context = self.manifest["spec"]["securityContext"]
        user, group = str(context["runAsUser"]), str(context["runAsGroup"])
        rights = ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
        return ["setpriv", "--reuid", user, "--regid", group, "--clear-groups", *rights, "--"]

    @property
    def env(self) -> dict[str, str]:
        return {"PATH": PATH, **{e["name"]: e["value"] for e in self.container.get("env", ())}}

    async def run(self) -> None:
        """Runs it to its end, and says so."""
        try:
            await self._start()
        except LookupError as error:
            await self._report("Pending", {"waiting": {"reason": error.args[0], **error.args[1]}})
            return
        assert self.process is not None
        running = {"running": {"startedAt": self.started}}
        await self._report("Running", running)
        deadline = self.manifest["spec"].get("activeDeadlineSeconds")
        try:
            async with asyncio.timeout(deadline):
                code = await self.process.wait()
        except TimeoutError:
            self.reason = "DeadlineExceeded"
            self.kill()
            code = await self.process.wait()
        code = code if code >= 0 else 128 - code
        ended: Json = {"exitCode": code, "reason": "Error" if code else "Completed"}
        if code:
            ended["message"] = (self.directory / "log").read_text(errors="replace")[-2000:]
        await self._report("Failed" if code else "Succeeded", {"terminated": ended})

    async def _start(self) -> None:
        image = self.container["image"]
        if image not in IMAGES:
            raise LookupError("ErrImagePull", {"message": f'image "{image}": not found'})
        self.directory.mkdir()
        mounts = await self._mounts()
        if (found := cgroups.detect()) is not None:
            limits = self.container["resources"]["limits"]
            self.groups = found.create(
                f"pod-{self.uid}",
                Limits(
                    cpus=_quantity(limits["cpu"]),
                    memory_mb=int(_quantity(limits["memory"])) // MB,
                    pids=8192,
                ),
            )
        told, tell = os.pipe()
        call = ["bwrap", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--as-pid-1"]
        call += ["--die-with-parent", "--info-fd", str(tell)]
        call += ["--hostname", self.manifest["spec"].get("hostname", self.name)]
        if self.manifest["metadata"]["labels"].get("klong.network") != "open":
            call += ["--unshare-net"]
        call += [*mounts, "--remount-ro", "/", "--chdir", self.container["workingDir"]]
        call += ["--clearenv"]
        for name, value in self.env.items():
            call += ["--setenv", name, value]
        join = 'for g in $KLONG_GROUPS; do echo 0 >"$g" || exit 125; done; exec "$@"'
        with open(self.directory / "log", "wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *["/bin/sh", "-c", join, "sh", *call, "--", *self.user],
                *self.container["command"],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "KLONG_GROUPS": self._groups},
                pass_fds=[tell],
                start_new_session=True,
            )
        os.close(tell)
        with open(told) as file:
            said = await asyncio.to_thread(file.read)
        self.first = int(json.loads(said)["child-pid"]) if said else 0
        # Not before its root is its own.
        while self.process.returncode is None and _name(self.first) in ("bwrap", "setpriv"):
            await asyncio.sleep(0.005)
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    @property
    def _groups(self) -> str:
        return " ".join(map(str, self.groups))

    async def _mounts(self) -> list[str]:
        etc = self.directory / "etc"
        bubblewrap.install(etc, self.directory / "filter")
        call = ["--ro-bind", "/usr", "/usr"]
        for name in ("bin", "sbin", "lib", "lib64"):
            if os.path.islink(f"/{name}"):
                call += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        call += ["--ro-bind", str(etc), "/etc", "--proc", "/proc", "--dev", "/dev"]
        call += ["--ro-bind", "/proc/sys", "/proc/sys"]
        call += ["--size", str(64 << 20), "--perms", "1777", "--tmpfs", "/dev/shm"]
        for parent in ("/run", "/run/klong", "/home"):
            call += ["--perms", "0755", "--dir", parent]
        volumes = {}
        for volume in self.manifest["spec"].get("volumes", ()):
            volumes[volume["name"]] = await self._volume(volume)
        for mount in self.container.get("volumeMounts", ()):
            source = volumes[mount["name"]] / mount.get("subPath", "")
            if not source.exists():
                source.mkdir()
                self._open(source)
            bind = "--ro-bind" if mount.get("readOnly") else "--bind"
            call += [bind, str(source), mount["mountPath"]]
        return call

    async def _volume(self, volume: Json) -> Path:
        place = self.directory / "volumes" / volume["name"]
        place.mkdir(parents=True)
        if "emptyDir" in volume:
            self._open(place)
        elif "configMap" in volume:
            told = volume["configMap"]
            namespace = self.path.rpartition("/pods/")[0]
            found = await self.api.ask("GET", f"{namespace}/configmaps/{told['name']}")
            data = {key: text.encode() for key, text in found.get("data", {}).items()}
            binary = found.get("binaryData", {})
            data |= {key: base64.b64decode(text) for key, text in binary.items()}
            for item in told["items"]:
                target = place / item["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data[item["key"]])
        else:
            for item in volume["downwardAPI"]["items"]:
                name = item["fieldRef"]["fieldPath"].split("'")[1]
                text = self.manifest["metadata"]["annotations"][name]
                (place / item["path"]).write_text(text)
        return place

    def _open(self, place: Path) -> None:
        group = self.manifest["spec"]["securityContext"]["fsGroup"]
        os.chown(place, 0, group)
        place.chmod(0o2777)

    async def _report(self, phase: str, state: Json) -> None:
        container = {
            "name": self.container["name"],
            "image": self.container["image"],
            "imageID": "",
            "ready": phase == "Running",
            "restartCount": 0,
            "state": state,
        }
        status: Json = {"phase": phase, "containerStatuses": [container]}
        status |= {"reason": self.reason} if self.reason else {}
        if self.started:
            status["startTime"] = self.started
        with suppress(RuntimeError, aiohttp.ClientError):
            await self.api.ask("PATCH", f"{self.path}/status", {"status": status})

    def kill(self) -> None:
        """Kills what runs; the first process takes the others with it."""
        self.gone = True
        for pid in (self.first, self.process.pid if self.process else 0):
            if pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def remove(self) -> None:
        """Kills it and removes what it had here."""
        self.kill()
        if self.process is not None:
            await self.process.wait()
        if self.groups and (found := cgroups.detect()) is not None:
            await found.remove(f"pod-{self.uid}")
        await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)

    async def enter(self, command: list[str]) -> asyncio.subprocess.Process:
        """Starts another program in it, as a runtime does: its parent is outside."""
        join = 'for g in $KLONG_GROUPS; do echo 0 >"$g" || exit 125; done; exec "$@"'
        spaces = ["nsenter", "-t", str(self.first), "-m", "-p", "-i", "-u", "-n"]
        clean = ["/usr/bin/env", "-i", *(f"{key}={text}" for key, text in self.env.items())]
        return await asyncio.create_subprocess_exec(
            *["/bin/sh", "-c", join, "sh", *spaces, "--", *self.user, *clean, *command],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "KLONG_GROUPS": self._groups},
        )


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _quantity(text: str) -> float:
    """A number as Kubernetes writes it."""
    units = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9}
    return float(text[:-1]) * units[text[-1]] if text[-1] in units else float(text)


class Kubelet:
    """The node."""

    def __init__(self, api: Api, root: Path) -> None:
        self.api, self.root = api, root
        self.pods: dict[str, Pod] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    async def register(self, port: int) -> None:
        """Makes the node, where the API server finds this process."""
        await self.api.ask("POST", "/api/v1/nodes", {"metadata": {"name": NODE}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        await self.api.ask("PATCH", f"/api/v1/nodes/{NODE}/status", {"status": status})

    async def follow(self) -> None:
        """Takes every pod that there is, from the first, until the API server goes."""
        listed = await self.api.ask("GET", "/api/v1/pods")
        there = {manifest["metadata"]["uid"] for manifest in listed["items"]}
        for uid in self.pods.keys() - there:
            self.spawn(self.pods.pop(uid).remove())
        for manifest in listed["items"]:
            self.take("ADDED", manifest)
        version = listed["metadata"]["resourceVersion"]
        path = f"{self.api.server}/api/v1/pods?watch=1&resourceVersion={version}"
        async with self.api.session.get(path) as events:
            while line := await events.content.readline():
                event = json.loads(line)
                self.take(event["type"], event["object"])

    def take(self, kind: str, manifest: Json) -> None:
        """Schedules, starts or removes a pod."""
        uid = manifest["metadata"]["uid"]
        if kind == "DELETED":
            if (pod := self.pods.pop(uid, None)) is not None:
                self.spawn(pod.remove())
        elif "nodeName" not in manifest["spec"]:
            self.spawn(self.bind(manifest["metadata"]))
        elif uid not in self.pods and manifest["status"]["phase"] == "Pending":
            pod = self.pods[uid] = Pod(self.api, self.root, manifest)
            self.spawn(pod.run())

    async def bind(self, metadata: Json) -> None:
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/binding"
        body = {"metadata": {"name": metadata["name"]}, "target": {"kind": "Node", "name": NODE}}
        with suppress(RuntimeError):  # Deleted, or bound, meanwhile.
            await self.api.ask("POST", path, body)

    def spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def exec(self, request: web.Request) -> web.StreamResponse:
        """A program's streams as messages of a channel byte and data."""
        match = request.match_info
        pod = next(
            (
                p
                for p in self.pods.values()
                if p.name == match["pod"] and p.first and match["namespace"] in p.path
            ),
            None,
        )
        if pod is None:
            raise web.HTTPNotFound(text=f"pod {match['pod']} has no container that runs")
        socket = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await socket.prepare(request)
        process = await pod.enter(request.query.getall("command"))
        assert process.stdin and process.stdout and process.stderr

        async def pump(channel: int, stream: asyncio.StreamReader) -> None:
            with suppress(ConnectionError):
                while data := await stream.read(32768):
                    await socket.send_bytes(bytes([channel]) + data)

        async def finish() -> None:
            await asyncio.gather(pump(1, process.stdout), pump(2, process.stderr))
            code = await process.wait()
            told: Json = {"metadata": {}, "status": "Success"}
            if code:
                causes = [{"reason": "ExitCode", "message": str(code)}]
                told = {"status": "Failure", "reason": "NonZeroExitCode"}
                told["details"] = {"causes": causes}
            with suppress(ConnectionError):
                await socket.send_bytes(b"\x03" + json.dumps(told).encode())
                await socket.close()

        self.spawn(finish())
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY and message.data[:1] == b"\0":
                with suppress(ConnectionError):
                    process.stdin.write(message.data[1:])
                    await process.stdin.drain()
        process.stdin.close()
        return socket


async def main(server: str, token: str, certificate: str, key: str, root: str) -> None:
    api = Api(server, token)
    kubelet = Kubelet(api, Path(root))
    app = web.Application()
    app.add_routes([web.get("/exec/{namespace}/{pod}/{container}", kubelet.exec)])
    app.add_routes([web.get("/exec/{namespace}/{pod}/{uid}/{container}", kubelet.exec)])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    await kubelet.register(runner.addresses[0][1])
    print("registered", flush=True)
    try:
        while True:
            # An API server may be started again.
            with suppress(aiohttp.ClientError, RuntimeError):
                await kubelet.follow()
            await asyncio.sleep(0.2)
    finally:
        for pod in kubelet.pods.values():
            await pod.remove()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
