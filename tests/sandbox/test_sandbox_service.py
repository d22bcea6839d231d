"""The service itself: life and death of sandboxes, authorisation, addresses, what a kill leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from sandbox_helpers import BACKENDS, Service, in_box, require, sleepers, unique_sleep, wait_until

from sandbox.client import (
    Sandbox,
    SandboxClient,
    SandboxGone,
    SandboxRefused,
    SandboxSpec,
    SandboxUnauthorised,
    SandboxUnavailable,
)
from sandbox.service import embedded, serve
from sandbox.spec import new_id

ROOT = Path(__file__).parents[2]


def test_unknown_and_closed_sandboxes_are_gone(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        await box.close()
        await box.close()
        client = SandboxClient(service.url)
        for call in (box.exec("true"), box.read("x"), box.write("x", ""), box.download_tree()):
            with pytest.raises(SandboxGone, match=box.id):
                await call
        with pytest.raises(SandboxGone, match="sb-nosuch"):
            await client.attach("sb-nosuch")
        await client.close()

    in_box(service.url, body)


def test_listing_and_attaching(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        async with SandboxClient(service.url) as client:
            listed = {info.id: info for info in await client.list()}
            assert listed[box.id].spec.labels == {"task": "t"}
            await (await client.attach(box.id)).write("x", "from another client")
        assert await box.read("x") == b"from another client"
        await box.close()
        async with SandboxClient(service.url) as client:
            assert box.id not in [info.id for info in await client.list()]

    in_box(service.url, body, SandboxSpec(labels={"task": "t"}))


def test_a_sandbox_expires(service: Service) -> None:
    argument = unique_sleep()

    async def body(box: Sandbox) -> None:
        with pytest.raises(SandboxGone, match="closed"):
            await box.exec(f"sleep {argument}")
        with pytest.raises(SandboxGone, match="expired"):
            await box.exec("true")
        gone = lambda: not list(service.state_dir.glob(f"*/*/{box.id}"))  # noqa: E731
        assert await asyncio.to_thread(wait_until, gone)
        assert sleepers(argument) == []

    in_box(service.url, body, SandboxSpec(lifetime_s=3))


def test_a_creation_whose_caller_went_away_is_undone(service: Service) -> None:
    async def main() -> None:
        async with SandboxClient(service.url) as client:
            # Before the request, while it is made, while the answer is on its way, after it.
            for pause in (0.0, *(n * 0.0005 for n in range(30)), 0.1):
                creation = asyncio.create_task(client.create())
                await asyncio.sleep(pause)
                if creation.done():
                    await creation.result().close()
                creation.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await creation
            gone = lambda: not list(service.state_dir.glob("*/*/sb-*"))  # noqa: E731
            assert await asyncio.to_thread(wait_until, gone)
            assert await client.list() == []

    asyncio.run(main())


def test_creating_twice_under_one_id_gives_one_sandbox(service: Service) -> None:
    async def main() -> None:
        url = f"{service.url}/sandboxes/{new_id()}"
        async with aiohttp.ClientSession() as session:
            answers = []
            for _ in range(2):
                async with session.put(url) as answer:
                    answers.append(await answer.json())
            assert answers[0] == answers[1]
            async with session.put(url, data='{"lifetime_s": 7}') as answer:
                assert answer.status == 400
                assert "choose another id" in (await answer.json())["error"]
            await session.delete(url)

    asyncio.run(main())


def test_a_sandbox_closed_before_it_was_there_is_never_made(service: Service) -> None:
    async def main() -> None:
        url = f"{service.url}/sandboxes/{new_id()}"
        async with aiohttp.ClientSession() as session:
            await session.delete(url)
            async with session.put(url) as answer:
                assert answer.status == 410

    asyncio.run(main())


def test_an_id_that_could_leave_its_directory_is_refused(service: Service) -> None:
    async def main() -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.put(f"{service.url}/sandboxes/sb-..%2F..%2Fetc") as answer,
        ):
            assert answer.status == 400
            assert "id" in (await answer.json())["error"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ('{"limits": {"cpus": -1}}', "limits.cpus"),
        ('{"limits": {"ram": 1}}', "limits.ram"),
        ('{"limits": {"disk_mb": 1}}', "limits.disk_mb"),
        ('{"limits": {"open_files": 2}}', "limits.open_files"),
        ('{"idle_s": 0}', "idle_s"),
        ('{"lifetime_s": "long"}', "lifetime_s"),
        ('{"image": "no-such-image:ever"}', "image"),
        ('{"env": {"A B": "x"}}', "env"),
        ("[", "request body"),
    ],
)
def test_bad_specs_are_refused_in_one_sentence(service: Service, body: str, names: str) -> None:
    async def main() -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.put(f"{service.url}/sandboxes/{new_id()}", data=body) as answer,
        ):
            assert answer.status == 400
            error = (await answer.json())["error"]
            assert names in error and error.endswith(".") and "\n" not in error

    asyncio.run(main())


def test_other_addresses_answer_json_errors(service: Service) -> None:
    async def main() -> None:
        async with aiohttp.ClientSession() as session:
            for method, path, status in (("GET", "/nothing", 404), ("PATCH", "/sandboxes", 405)):
                async with session.request(method, service.url + path) as answer:
                    assert answer.status == status
                    assert path in (await answer.json())["error"]

    asyncio.run(main())


def test_token_is_asked_for() -> None:
    async def main(url: str) -> None:
        for token in (None, "wrong", "sesam\u00e9"):
            async with SandboxClient(url, token) as client:
                assert (await client.health())["status"] == "ok"
                with pytest.raises(SandboxUnauthorised, match="token"):
                    await client.create()
        async with SandboxClient(url, "sesame") as client, await client.create() as box:
            assert (await box.exec("echo in")).stdout == "in\n"

    with embedded("local", token="sesame") as url:
        asyncio.run(main(url))


def test_addresses_that_cannot_be_served() -> None:
    with embedded("local") as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(SandboxUnavailable, match=rf"^port {port} of 127.0.0.1 is in use"):
            serve(backend="local", port=port)
    with pytest.raises(SandboxRefused, match="set a token"):
        serve(backend="local", host="0.0.0.0", port=0)


def test_only_who_asks_for_it_is_served_without_isolation(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(state_dir))
    with pytest.raises(SandboxUnavailable, match="bwrap is not installed"):
        serve(backend="local", port=0, state_dir=state_dir)
    # For oneself it will do, with a word.
    with embedded("local", state_dir=state_dir):
        assert "not isolated" in caplog.text


def test_no_service_at_the_address() -> None:
    with embedded("local") as url:
        pass

    async def main() -> None:
        async with SandboxClient(url) as client:
            with pytest.raises(SandboxUnavailable, match=url):
                await client.create()

    asyncio.run(main())


_AS_USER = """
import asyncio, json, os, sys
from pathlib import Path
from sandbox.client import Limits, SandboxClient, SandboxSpec
from sandbox.service import embedded

async def use(url):
    async with SandboxClient(url) as client:
        spec = SandboxSpec(limits=Limits(memory_mb=200, pids=20))
        async with await client.create(spec) as box:
            await box.write("d/f", "text")
            run = await box.exec("cat d/f; id -u; mkdir locked; touch locked/x; chmod 0 locked")
            daemon = await box.exec(f"(setsid -f sleep {sys.argv[4]} >/dev/null 2>&1); sleep 0.1")
            slow = f"(setsid sh -c 'trap : TERM; sleep {sys.argv[4]}; sleep 9' & ) ; sleep 60"
            late = await box.exec(slow, timeout_s=0.5)
            memory = await box.exec("python3 -c 'b = bytearray(400_000_000)'")
            fork = "n=0; while [ $n -lt 40 ]; do sleep 1 & n=$((n+1)); done; echo all"
            forks = await box.exec(fork)
            await box.exec("chmod 700 locked")
            tree = await box.download_tree()
        health = await client.health()
    print(json.dumps({"out": run.stdout, "late": late.timed_out, "memory": memory.exit_code,
                      "forks": forks.stdout, "tree": len(tree), **health}))

def serve():
    with embedded("local", isolation=sys.argv[1], state_dir=Path(sys.argv[2])) as url:
        asyncio.run(use(url))

if sys.argv[3] == "warm":
    serve()  # Loads every module while the interpreter's files can still be read.
os.setgroups([]); os.setgid(54321); os.setuid(54321)
serve()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", ["local-bubblewrap", "local-plain"])
def test_a_service_without_root(name: str, state_dir: Path) -> None:
    require(name)
    argument = unique_sleep()
    own = state_dir / "own"
    own.mkdir()
    os.chown(own, 54321, 54321)
    isolation = BACKENDS[name][1]
    script = _AS_USER.replace("Path(sys.argv[2])", "Path(sys.argv[2]) / str(os.getuid())")
    done = subprocess.run(
        [sys.executable, "-c", script, isolation, str(own), "warm", argument],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    uid = "1000" if isolation == "bubblewrap" else "54321"
    assert told["out"] == f"text{uid}\n" and told["late"] and told["tree"] > 1024
    assert told["isolation"] == isolation
    assert told["memory"] != 0
    if isolation == "bubblewrap":
        assert told["limits"] == "rlimits in a user namespace"
        assert told["forks"] == ""
    assert sleepers(argument) == []
    assert not list((own / "54321").glob("*/*/sb-*"))
