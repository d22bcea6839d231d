"""The contract of pausing: all stands still, time limits too, and goes on where it was."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from sandbox_helpers import Service, in_box, serving, sleepers, unique_sleep, wait_until

from sandbox.client import (
    Sandbox,
    SandboxClient,
    SandboxGone,
    SandboxPaused,
    SandboxRefused,
    SandboxSpec,
    SandboxUnavailable,
)

# In the background, in the workspace; the file is there at once.
_TICK = "echo x >>ticks; (while :; do echo x >>ticks; sleep 0.02; done) &"


async def _stands_still(ticks: Path) -> bool:
    before = ticks.stat().st_size
    await asyncio.sleep(0.3)
    return ticks.stat().st_size == before


async def _runs(ticks: Path) -> bool:
    before = ticks.stat().st_size
    return await asyncio.to_thread(wait_until, lambda: ticks.stat().st_size > before)


@pytest.fixture(autouse=True)
def _pausing(request: pytest.FixtureRequest) -> None:
    """Skips where the machine lacks the control groups to pause with; in CI fails."""
    if "service" not in request.fixturenames:
        return

    async def body(box: Sandbox) -> str:
        try:
            await box.pause()
        except SandboxRefused as error:
            return str(error)
        return ""

    lack = in_box(request.getfixturevalue("service").url, body)
    if lack and os.environ.get("CI") != "true":
        pytest.skip(lack)
    assert not lack


def test_a_paused_sandbox_does_and_answers_nothing_until_it_is_resumed(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        session = await box.session()
        await session.run(f"{_TICK} cd /tmp")
        (ticks,) = service.state_dir.glob(f"*/*/{box.id}/data/workspace/ticks")
        assert await _runs(ticks)
        await box.pause()
        await box.pause()
        assert box.info.paused_at is not None and await _stands_still(ticks)
        refused: list[Callable[[], Awaitable[object]]] = [
            lambda: box.exec("true"),
            lambda: box.session("other"),
            lambda: session.run("true"),
            session.close,
            lambda: box.read("ticks"),
            lambda: box.write("new", "x"),
            box.download_tree,
            lambda: box.upload_tree({"new": "x"}),
        ]
        for request in refused:
            with pytest.raises(SandboxPaused, match=f"{box.id} is paused: resume it first"):
                await request()
        assert (await box._client.usage())[box.id]["state"] == "paused"
        assert (await box._client.attach(box.id)).info.paused_at == box.info.paused_at
        await box.resume()
        await box.resume()
        assert box.info.paused_at is None and await _runs(ticks)
        assert (await session.run("pwd")).stdout == "/tmp\n"
        kinds = [event.kind for event in await box._client.log(box.id)]
        assert kinds.count("pause") == kinds.count("resume") == 1

    in_box(service.url, body)


def test_the_time_limit_of_a_command_stands_still_with_it(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        session = await box.session()
        wait = "until [ -e go ]; do sleep 0.05; done; echo in time"
        last = asyncio.create_task(session.run(wait, timeout_s=3))
        late = asyncio.create_task(box.exec("sleep 60", timeout_s=3))
        await asyncio.sleep(0.1)
        await box.pause()
        await asyncio.sleep(3)
        assert not last.done() and not late.done()
        await box.resume()
        await box.write("go", "")
        assert (await last).stdout == "in time\n"
        # Less what was spent paused, it is held to its limit; and so is what comes after.
        assert (await late).timed_out
        assert (await box.exec("sleep 60", timeout_s=0.2)).timed_out

    in_box(service.url, body)


def test_a_paused_sandbox_is_not_idle_but_expires(service: Service) -> None:
    argument = unique_sleep()

    async def is_gone(box: Sandbox) -> None:
        with pytest.raises(SandboxGone):
            while True:
                await box._client.attach(box.id)
                await asyncio.sleep(0.05)

    async def idles(client: SandboxClient) -> None:
        box = await client.create(SandboxSpec(idle_s=2))
        await box.pause()
        await asyncio.sleep(2.2)
        await box.resume()
        await is_gone(box)
        assert (await client.log(box.id))[-1].facts["why"] == "idle"

    async def expires(client: SandboxClient) -> None:
        box = await client.create(SandboxSpec(lifetime_s=6))
        session = await box.session()
        await session.run(f"setsid -f sleep {argument}")
        await box.pause()
        await is_gone(box)
        assert (await client.log(box.id))[-1].facts["why"] == "expired"
        assert await asyncio.to_thread(wait_until, lambda: not sleepers(argument))

    async def main() -> None:
        async with SandboxClient(service.url) as client:
            await asyncio.gather(idles(client), expires(client))

    asyncio.run(main())


def test_closing_a_paused_sandbox_ends_it_and_whoever_waits(service: Service) -> None:
    argument = unique_sleep()

    async def body(box: Sandbox) -> None:
        running = asyncio.create_task(box.exec(f"sleep {argument}"))
        assert await asyncio.to_thread(wait_until, lambda: bool(sleepers(argument)))
        await box.pause()
        await box.close()
        with pytest.raises(SandboxGone):
            await running
        assert not sleepers(argument)

    in_box(service.url, body)


def test_a_killed_service_leaves_a_paused_sandbox_paused(kind: str, state_dir: Path) -> None:
    argument = unique_sleep()

    async def first(client: SandboxClient) -> tuple[Sandbox, asyncio.Task[str]]:
        box = await client.create()
        session = await box.session("work")
        await session.run(f"{_TICK} cd /tmp; A=1; setsid -f sleep {argument}")

        async def work() -> str:
            wait = "until [ -e go ]; do sleep 0.05; done; echo in time"
            done = await box.exec(f"echo begun >begun; {wait}", timeout_s=3)
            return done.stdout

        running = asyncio.create_task(work())
        while not (await box.exec("cat begun")).stdout:
            pass
        await box.pause()
        return box, running

    async def main() -> None:
        with serving(kind, state_dir) as (killed, url):
            client = SandboxClient(url, reconnect_s=60)
            box, running = await first(client)
            killed.kill()
            killed.wait()
        (ticks,) = state_dir.glob(f"*/*/{box.id}/data/workspace/ticks")
        assert await _stands_still(ticks)
        time.sleep(2)
        with serving(kind, state_dir, port=int(url.rpartition(":")[2])) as (again, url):
            async with SandboxClient(url) as other:
                (info,) = await other.list()
                assert info.paused_at == box.info.paused_at
                used = (await other.usage())[box.id]
                assert used == {"state": "paused", "processes": 0, "memory_bytes": 0}
                (ticks,) = state_dir.glob(f"*/*/{box.id}/data/workspace/ticks")
                assert await _stands_still(ticks)
                with pytest.raises(SandboxPaused, match="resume it before a snapshot"):
                    await (await other.attach(box.id)).snapshot()
                # Its command is asked for again, and waited for.
                await (await other.attach(box.id)).resume()
                await box.write("go", "")
                assert await running == "in time\n"
                session = box.attach_session("work")
                assert (await session.run("pwd; echo $A")).stdout == "/tmp\n1\n"
                assert await _runs(ticks)
                await (await other.attach(box.id)).pause()
                await client.close()
                again.terminate()
                assert await asyncio.to_thread(again.wait, 15) == 0
        assert not sleepers(argument) and not list(state_dir.glob("*/*/sb-*"))

    asyncio.run(main())


def test_a_paused_sandbox_of_a_process_that_is_no_more_is_removed(
    kind: str, state_dir: Path
) -> None:
    argument = unique_sleep()

    async def main() -> None:
        with serving(kind, state_dir, embedded=True) as (killed, url):
            async with SandboxClient(url) as client:
                box = await client.create()
                running = asyncio.create_task(box.exec(f"sleep {argument}"))
                assert await asyncio.to_thread(wait_until, lambda: bool(sleepers(argument)))
                await box.pause()
                killed.kill()
                killed.wait()
                with pytest.raises(SandboxUnavailable):
                    await running
        # Frozen, it cannot end by itself.
        assert sleepers(argument)
        with serving(kind, state_dir):
            assert not sleepers(argument) and not list(state_dir.glob(f"*/*/{box.id}"))

    asyncio.run(main())
