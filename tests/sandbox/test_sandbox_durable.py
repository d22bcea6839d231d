"""What a service that ends leaves: nothing when told to, living sandboxes when killed."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from sandbox_helpers import serving, sleepers, unique_sleep, wait_until

from sandbox.client import (
    SandboxClient,
    SandboxGone,
    SandboxSpec,
    SandboxUnavailable,
)


async def _leave_running(url: str, service: subprocess.Popen[str], argument: str) -> str:
    """Makes a sandbox with a command and a daemon in it, kills the service; returns its id."""
    async with SandboxClient(url) as client:
        box = await client.create()
        await box.write("kept", "kept")
        daemon = f"(setsid -f sleep {argument} >/dev/null 2>&1)"
        running = asyncio.create_task(box.exec(f"{daemon}; sleep {argument}"))
        assert await asyncio.to_thread(wait_until, lambda: len(sleepers(argument)) >= 2)
        service.kill()
        service.wait()
        with pytest.raises(SandboxUnavailable):
            await running
        return box.id


def _containers(sandbox_id: str) -> list[str]:
    command = ["docker", "ps", "-aq", "--filter", f"label=klong.sandbox={sandbox_id}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def _left(kind: str, state_dir: Path, sandbox_id: str) -> list[object]:
    # `os.walk` minds no group that goes while it looks, as those of other sandboxes do.
    groups = [
        f"{parent}/{name}"
        for parent, names, _ in os.walk("/sys/fs/cgroup")
        for name in names
        if name == sandbox_id and parent.endswith("/klong-sandbox")
    ]
    found: list[object] = [*state_dir.glob(f"*/*/{sandbox_id}"), *groups]
    return found + (list(_containers(sandbox_id)) if kind == "docker" else [])


def test_what_a_killed_process_embedded_ends_by_itself(kind: str, state_dir: Path) -> None:
    argument = unique_sleep()
    with serving(kind, state_dir) as (_, survivor_url):

        async def main() -> None:
            async with SandboxClient(survivor_url) as client, await client.create() as box:
                await box.write("kept", "kept")
                with serving(kind, state_dir, embedded=True) as (killed, url):
                    sandbox_id = await _leave_running(url, killed, argument)
                # With nobody left to tell it, the agent ends the sandbox.
                assert await asyncio.to_thread(wait_until, lambda: not sleepers(argument))
                assert _left(kind, state_dir, sandbox_id), "nothing was left to clean up"
                with serving(kind, state_dir) as (again, url):
                    assert not _left(kind, state_dir, sandbox_id)
                    async with SandboxClient(url) as other:
                        assert await other.list() == []
                    # A service that lives keeps its sandboxes.
                    assert (await box.exec("cat kept")).stdout == "kept"
                    again.terminate()
                    assert again.wait(10) == 0

        asyncio.run(main())


def test_what_a_killed_service_served_is_adopted(kind: str, state_dir: Path) -> None:
    argument = unique_sleep()

    async def first(url: str, service: subprocess.Popen[str]) -> tuple[str, asyncio.Task[str]]:
        client = SandboxClient(url, reconnect_s=20)
        box = await client.create(SandboxSpec(labels={"task": "t"}, env={"A": "1"}))
        session = await box.session("work", env={"B": "2"})
        await session.run(f"cd /tmp; C=3; sleep {argument} &")

        async def work() -> str:
            # Once, although it is asked for twice.
            done = await box.exec("echo once >>log; sleep 1.5; cat log")
            await client.close()
            return done.stdout

        running = asyncio.create_task(work())
        while not (await box.exec("cat log")).stdout:
            pass
        service.kill()
        service.wait()
        return box.id, running

    async def second(url: str, service: subprocess.Popen[str], sandbox_id: str) -> None:
        async with SandboxClient(url) as client:
            assert [info.id for info in await client.list()] == [sandbox_id]
            box = await client.attach(sandbox_id)
            assert box.info.spec.labels == {"task": "t"}
            session = box.attach_session("work")
            assert (await session.run("echo $A$B$C; pwd")).stdout == "123\n/tmp\n"
            assert (await session.run("jobs -p | wc -l")).stdout == "1\n" and sleepers(argument)
            assert (await box.exec("python3 -c 'import ssl' && cat /etc/group")).exit_code == 0
            service.terminate()
            assert await asyncio.to_thread(service.wait, 15) == 0
        assert sleepers(argument) == []
        assert not _left(kind, state_dir, sandbox_id)

    async def main() -> None:
        with serving(kind, state_dir) as (killed, url):
            sandbox_id, running = await first(url, killed)
        port = int(url.rpartition(":")[2])
        with serving(kind, state_dir, port=port) as (again, url):
            assert await running == "once\n"
            await second(url, again, sandbox_id)

    asyncio.run(main())


def test_a_service_is_missed_from_when_it_went_not_from_when_it_was_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sandbox.client._IN_VAIN_S", 0.2)
    tries: list[float] = []

    async def send() -> str:
        tries.append(0.0)
        if len(tries) == 1:
            await asyncio.sleep(0.4)  # A command that ran for longer than the client waits.
        if len(tries) < 3:
            raise SandboxUnavailable("the service was killed")
        return "answer"

    client = SandboxClient("http://127.0.0.1:9", reconnect_s=0.35)
    assert asyncio.run(client._insist(send)) == "answer"


def test_a_sandbox_expires_without_its_service(kind: str, state_dir: Path) -> None:
    argument = unique_sleep()

    async def main() -> None:
        with serving(kind, state_dir) as (killed, url):
            async with SandboxClient(url) as client:
                box = await client.create(SandboxSpec(lifetime_s=4))
                session = await box.session()
                await session.run(f"(setsid -f sleep {argument})")
                killed.kill()
        assert sleepers(argument)
        assert await asyncio.to_thread(wait_until, lambda: not sleepers(argument))
        with serving(kind, state_dir):
            assert not _left(kind, state_dir, box.id)

    asyncio.run(main())


def test_terminating_a_service_removes_everything(kind: str, state_dir: Path) -> None:
    argument = unique_sleep()

    async def main(url: str, process: subprocess.Popen[str]) -> str:
        async with SandboxClient(url) as client:
            box = await client.create()
            running = asyncio.create_task(box.exec(f"sleep {argument} & sleep {argument}"))
            assert await asyncio.to_thread(wait_until, lambda: len(sleepers(argument)) >= 2)
            process.terminate()
            with pytest.raises((SandboxGone, SandboxUnavailable)):
                await running
            assert await asyncio.to_thread(process.wait, 15) == 0
            return box.id

    with serving(kind, state_dir) as (process, url):
        sandbox_id = asyncio.run(main(url, process))
        assert sleepers(argument) == []
        assert not _left(kind, state_dir, sandbox_id)
        assert not list(state_dir.glob("*/*/sb-*"))
