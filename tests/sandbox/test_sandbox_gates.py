"""Reading before work and conditions before the end, asked by the service of whoever calls."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from sandbox_helpers import Service, in_box, serving, sleepers, unique_sleep

from sandbox.client import (
    Gates,
    Sandbox,
    SandboxClient,
    SandboxEnded,
    SandboxGated,
    SandboxRefused,
    SandboxUnfinished,
)

GATES = Gates(("one\n", "two \u00fc"), '[ -e done ] || { echo "no file done" >&2; exit 3; }')


async def _refused(box: Sandbox, kind: type[SandboxRefused], match: str) -> None:
    """Whether all that is work is refused, in a session that is there, too."""
    session = box.attach_session("early")
    for work in (
        box.exec("touch x"),
        box.session(),
        session.run("touch x"),
        box.write("x", "x"),
        box.upload_tree({"x": "x"}),
    ):
        with pytest.raises(kind, match=match):
            await work


def test_no_work_before_everything_is_read(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        await box.write("kept", "kept")
        await box.session("early")
        await box.arm(GATES)
        await _refused(box, SandboxGated, "reading .*: 1, 2")
        for part in (0, 3):
            with pytest.raises(SandboxRefused, match="has 2"):
                await box.take_part(part)
        assert await box.take_part(2) == await box.take_part(2) == GATES.reading[1]
        await _refused(box, SandboxGated, "reading .*: 1")
        with pytest.raises(SandboxGated, match="reading"):
            await box.end()
        assert await box.read("kept") == b"kept" and await box.download_tree()
        assert await box.take_part(1) == GATES.reading[0]
        assert (await box.attach_session("early").run("ls")).stdout == "kept\n"
        assert (await box.exec("ls")).stdout == "kept\n"

    in_box(service.url, body)


def test_gates_stay_as_they_were_armed(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        await box.arm(GATES)
        await box.arm(GATES)
        for other in (Gates(), Gates(GATES.reading)):
            with pytest.raises(SandboxRefused, match="which stay"):
                await box.arm(other)
        await _refused(box, SandboxGated, "1, 2")

    in_box(service.url, body)


def test_the_end_waits_for_its_check_and_ends_all_that_runs(service: Service) -> None:
    argument = unique_sleep()

    async def body(box: Sandbox) -> None:
        await box.session("early")
        await box.arm(Gates((), GATES.finish_check))
        with pytest.raises(SandboxUnfinished, match="finish check") as refused:
            await box.end()
        check = refused.value.facts["check"]
        assert check["exit_code"] == 3 and check["stderr"] == "no file done\n"
        early = box.attach_session("early")
        await early.run(f"sleep {argument} & touch done; (setsid -f sleep {argument})")
        running = asyncio.create_task(box.exec(f"touch started; sleep {argument}"))
        while b"started" not in await box.download_tree():
            pass
        ended = await box.end()
        assert ended is not None and ended.exit_code == 0
        assert sleepers(argument) == [] and (await running).exit_code == 137
        await _refused(box, SandboxEnded, "has ended")
        assert await box.read("done") == b""
        assert await box.end() is None

    in_box(service.url, body)


def test_without_gates_an_end_is_an_end(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        await box.session("early")
        assert await box.end() is None
        await _refused(box, SandboxEnded, "has ended")

    in_box(service.url, body)


def test_two_ends_at_once_are_one(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        running = asyncio.create_task(box.exec("touch runs; sleep 60"))
        while b"runs" not in await box.download_tree():
            pass
        assert await asyncio.gather(box.end(), box.end()) == [None, None]
        assert (await running).exit_code == 137
        await _refused(box, SandboxEnded, "has ended")

    in_box(service.url, body)


def test_a_check_that_hangs_lets_nothing_else_in_meanwhile(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        await box.arm(Gates((), "touch checking; sleep 60"))
        ending = asyncio.create_task(box.end(timeout_s=4))
        while b"checking" not in await box.download_tree():
            pass
        with pytest.raises(SandboxGated, match="being ended"):
            await box.exec("true")
        with pytest.raises(SandboxUnfinished) as refused:
            await ending
        assert refused.value.facts["check"]["timed_out"]
        assert (await box.exec("true")).exit_code == 0

    in_box(service.url, body)


def test_nothing_ends_while_files_are_written(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        sent, goes_on = asyncio.Event(), asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield b"first, "
            sent.set()
            await goes_on.wait()
            yield b"last"

        async with aiohttp.ClientSession() as session:
            address = f"{service.url}/sandboxes/{box.id}/files?path=x"
            writing = asyncio.create_task(session.put(address, data=slowly()))
            await sent.wait()
            while "write" not in [event.kind for event in await box._client.log(box.id)]:
                pass
            with pytest.raises(SandboxGated, match="being written"):
                await box.end()
            goes_on.set()
            (await writing).close()
        assert await box.end() is None
        assert await box.read("x") == b"first, last"

    in_box(service.url, body)


def test_gates_outlive_a_kill_of_the_service(state_dir: Path) -> None:
    """Also those of a sandbox that had another name when it was made."""

    async def first(url: str) -> list[str]:
        async with SandboxClient(url) as client:
            ended = await client.create()
            while not (await client.health())["waiting"]:
                pass
            half = await client.create()
            await half.arm(GATES)
            await half.take_part(2)
            await ended.end()
            return [half.id, ended.id]

    async def second(url: str, ids: list[str]) -> None:
        async with SandboxClient(url) as client:
            half, ended = [await client.attach(sandbox_id) for sandbox_id in ids]
            with pytest.raises(SandboxGated, match=r"reading .*: 1"):
                await half.exec("true")
            with pytest.raises(SandboxRefused, match="which stay"):
                await half.arm(Gates())
            assert await half.take_part(1) == GATES.reading[0]
            assert (await half.exec("true")).exit_code == 0
            with pytest.raises(SandboxEnded):
                await ended.exec("true")
            store = sqlite3.connect(state_dir / "local/store.db")
            assert store.execute("SELECT count(*) FROM gates").fetchone() == (2,)
            await half.close()
            await ended.close()
            assert store.execute("SELECT count(*) FROM gates").fetchone() == (0,)
            store.close()

    with serving("local-bubblewrap", state_dir, pool=1) as (killed, url):
        ids = asyncio.run(first(url))
        killed.kill()
        killed.wait()
    with serving("local-bubblewrap", state_dir) as (_, url):
        asyncio.run(second(url, ids))


def test_an_end_whose_answer_was_lost_is_heard_of_later(state_dir: Path) -> None:
    async def main() -> None:
        with serving("local-bubblewrap", state_dir) as (killed, url):
            client = SandboxClient(url, reconnect_s=20)
            box = await client.create()
            await box.arm(Gates((), "echo once >>log; sleep 1; cat log"))
            ending = asyncio.create_task(box.end())
            while b"once" not in await box.download_tree():
                pass
            killed.kill()
            killed.wait()
        with serving("local-bubblewrap", state_dir, port=int(url.rpartition(":")[2])):
            ended = await ending
            assert ended is not None and ended.stdout == "once\n"
            with pytest.raises(SandboxEnded):
                await box.exec("true")
            await box.close()
            await client.close()

    asyncio.run(main())
