"""Egress of whole sandboxes: packages through the index, the engine's death, the service's."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pip
import pytest
from egress_helpers import require_egress, upstream
from sandbox_helpers import in_box, make_backend, open_directory, require, serving, wait_until

from sandbox.client import (
    Egress,
    Sandbox,
    SandboxClient,
    SandboxEgressDown,
    SandboxRefused,
    SandboxSpec,
)
from sandbox.egress.settings import EgressSettings
from sandbox.service import embedded

SPEC = SandboxSpec(egress=Egress(allow=("open.example",), packages=("pypi",)))
FETCH = "import urllib.request as u; print(u.urlopen('https://{}').status)"


@pytest.fixture(scope="module")
def outside() -> Iterator[EgressSettings]:
    require_egress()
    with open_directory() as directory, upstream(directory) as (settings, _):
        yield settings


@pytest.fixture(params=["local-bubblewrap", pytest.param("docker", marks=pytest.mark.docker)])
def kind(request: pytest.FixtureRequest) -> str:
    require(request.param)
    return str(request.param)


async def _fetch(box: Sandbox, url: str = "open.example/a") -> str:
    done = await box.exec("python3 -", stdin=FETCH.format(url))
    return (done.stdout or done.stderr.strip().splitlines()[-1]).strip()


def _pip() -> dict[str, bytes]:
    """This environment's pip, for an image that has none."""
    root = Path(pip.__file__).parents[1]
    files = (path for path in (root / "pip").rglob("*") if path.suffix in (".py", ".pem", ".txt"))
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


async def _told(box: Sandbox, count: int) -> list[dict[str, object]]:
    """What the log tells of a sandbox's requests, once it tells of so many."""
    async with asyncio.timeout(20):
        while True:
            events = [e for e in await box._client.log(box.id) if e.kind == "egress"]
            if len(events) >= count:
                return [dict(event.facts) for event in events]


def _engines(state_dir: Path) -> list[int]:
    """The processes of a state directory's engines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"egress/engine.py\0" in words and f'"{state_dir}/'.encode() in words:
            found.append(int(path.parent.name))
    return found


def test_packages_are_installed_counted_and_told_of(
    kind: str, state_dir: Path, outside: EgressSettings
) -> None:
    async def body(box: Sandbox) -> None:
        await box.upload_tree(_pip())
        run = "python3 -m pip --disable-pip-version-check install --no-compile --target t demo"
        done = await box.exec(run, timeout_s=60)
        assert done.exit_code == 0, done
        shown = await box.exec("PYTHONPATH=t python3 -c 'import demo; print(demo.WORD)'")
        assert shown.stdout == "from the index\n"
        assert await _fetch(box, "evil.example/") == (
            "urllib.error.URLError: <urlopen error Tunnel connection failed: 403 Forbidden>"
        )
        dial = "import socket; s = socket.create_connection(('127.0.0.1', 3128))\n"
        await box.exec("python3 -", stdin=dial + "s.send(b'SSH-\\n\\n'); s.recv(9)")
        told = await _told(box, 4)
        (audit,) = state_dir.glob(f"*/egress/audit/{box.id}.jsonl")
        lines = [json.loads(line) for line in audit.read_text().splitlines()]
        urls = ["https://pypi.org/simple/demo/", "evil.example:443"]
        urls.insert(1, "https://files.pythonhosted.org/packages/aa/demo-1.0-py3-none-any.whl")
        reasons = ["package", "package", "not_allowed", "protocol"]
        assert [line["url"] for line in lines] == [*urls, ""]
        assert [line["reason"] for line in lines] == reasons
        assert told == [{k: v for k, v in line.items() if k != "at"} for line in lines]
        async with aiohttp.request("GET", f"{box._client.base_url}/metrics") as answer:
            text = await answer.text()
        counted = 'klong_sandbox_egress_verdicts_total{reason="package",verdict="allowed"} 2.0'
        assert counted in text
        assert (await box._client.health())["egress"] == "runs"

    with embedded(make_backend(kind, state_dir), egress=outside, pool=1) as url:
        in_box(url, body, SPEC)


def test_an_engine_that_dies_comes_back(state_dir: Path, outside: EgressSettings) -> None:
    require("local-bubblewrap")

    async def body(box: Sandbox) -> None:
        assert await _fetch(box) == "200"
        (first,) = _engines(state_dir)
        os.kill(first, signal.SIGKILL)
        # A command waits for the next.
        assert await asyncio.to_thread(wait_until, lambda: first not in _engines(state_dir))
        assert await _fetch(box) == "200"
        assert _engines(state_dir) != [first]

    with embedded(make_backend("local-bubblewrap", state_dir), egress=outside) as url:
        in_box(url, body, SPEC)
        assert len(_engines(state_dir)) == 1
    assert _engines(state_dir) == []


def test_without_an_engine_is_a_typed_error(state_dir: Path) -> None:
    require("local-bubblewrap")
    for python, said in (("/no/such", "is no interpreter"), ("/bin/false", "does not start")):
        settings = EgressSettings(python=Path(python))
        with embedded(make_backend("local-bubblewrap", state_dir), egress=settings) as url:

            async def main(url: str, said: str) -> None:
                async with SandboxClient(url) as client:
                    with pytest.raises(SandboxEgressDown, match=said):
                        await client.create(SPEC)
                    assert await client.list() == []
                    async with await client.create() as box:
                        assert (await box.exec("env | grep -ic proxy")).stdout == "0\n"

            asyncio.run(main(url, said))


def test_contradictions_are_refused(state_dir: Path) -> None:
    async def body(box: Sandbox) -> None:
        for spec, said in (
            (dataclasses.replace(SPEC, network=True), "beside network=True"),
            (SPEC, "plain processes have the host's network"),
        ):
            with pytest.raises(SandboxRefused, match=said):
                await box._client.create(spec)

    with embedded(make_backend("local-plain", state_dir)) as url:
        in_box(url, body)


def test_egress_survives_the_service(
    kind: str, state_dir: Path, outside: EgressSettings, tmp_path: Path
) -> None:
    file = tmp_path / "egress.json"
    file.write_text(json.dumps({"hosts": dict(outside.hosts), "trusted": str(outside.trusted)}))

    async def first(url: str) -> str:
        async with SandboxClient(url) as client:
            box = await client.create(SPEC)
            assert await _fetch(box) == "200"
            return box.id

    async def second(url: str, sandbox_id: str) -> None:
        async with SandboxClient(url) as client:
            box = await client.attach(sandbox_id)
            assert await _fetch(box) == "200"
            assert "403" in await _fetch(box, "evil.example/")
            await box.close()

    with serving(kind, state_dir, egress=file) as (killed, url):
        sandbox_id = asyncio.run(first(url))
        killed.kill()
        killed.wait()
        assert wait_until(lambda: not _engines(state_dir))
    with serving(kind, state_dir, egress=file) as (again, url):
        asyncio.run(second(url, sandbox_id))
        again.terminate()
        assert again.wait(15) == 0


def test_settings_are_refused_by_field(tmp_path: Path) -> None:
    file = tmp_path / "egress.json"
    for text, said in (
        ('{"host": {}}', "host: "),
        ("{", "Invalid JSON"),
        ('{"hosts": {"a.org": "b.org"}}', "hosts.a.org: "),
        ('{"hosts": 1}', "hosts"),
    ):
        file.write_text(text)
        with pytest.raises(SandboxRefused, match=said):
            EgressSettings.read(file)
    with pytest.raises(SandboxRefused, match="No such file"):
        EgressSettings.read(tmp_path / "none")
