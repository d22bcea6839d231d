"""Warm pools: what is claimed is as good as new; nothing waits too long, or for nobody."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sandbox_helpers import make_backend, require, serving, sleepers, unique_sleep, wait_until

from sandbox.api import ExecRequest, RunRequest, SessionRequest
from sandbox.backends import Backend
from sandbox.client import SandboxClient, SandboxError
from sandbox.manager import Manager
from sandbox.spec import Limits, SandboxSpec, new_id


@pytest.fixture(params=["local-bubblewrap", pytest.param("docker", marks=pytest.mark.docker)])
def backend(request: pytest.FixtureRequest, state_dir: Path) -> Iterator[Backend]:
    require(request.param)
    yield make_backend(request.param, state_dir)
    assert not list(state_dir.glob("*/*/sb-*"))


@asynccontextmanager
async def _opened(backend: Backend, *, pool: int, idle_s: float = 60.0) -> AsyncIterator[Manager]:
    manager = Manager(backend, pool=pool, pool_idle_s=idle_s)
    await manager.start()
    try:
        yield manager
    finally:
        await manager.close_all()
        assert manager.pool.waiting == []
        await backend.close()


async def _settled(manager: Manager, waiting: int) -> None:
    async with asyncio.timeout(20):
        while len(manager.pool.waiting) != waiting:
            await asyncio.sleep(0.01)


def _sources(manager: Manager, sandbox_id: str) -> list[object]:
    events = manager.events(sandbox_id, after=0, limit=10)
    return [event.facts["source"] for event in events if event.kind == "ready"]


def test_what_is_claimed_is_as_good_as_new(backend: Backend) -> None:
    small = Limits(memory_mb=100)
    first, second, other = (new_id() for _ in range(3))

    async def main() -> None:
        async with _opened(backend, pool=1) as manager:
            await manager.create(first, SandboxSpec(limits=small))
            await _settled(manager, 1)
            mine = SandboxSpec(limits=small, env={"A": "mine"}, labels={"task": "t"}, lifetime_s=50)
            info = await manager.create(second, mine)
            assert info.id == second and info.spec == mine
            assert 49 < info.expires_at - info.created_at < 51
            await manager.create(other, SandboxSpec())
            sources = [_sources(manager, i) for i in (first, second, other)]
            assert sources == [["new"], ["pool"], ["new"]]
            too_much = "echo $A; ls -A; cat /dev/zero | tail -c1G"
            told = await manager.exec(second, ExecRequest(too_much))
            assert told.stdout == "mine\n" and told.exit_code != 0
            await manager.close(second)
            assert {info.id for info in manager.list()} == {first, other}

    asyncio.run(main())


@pytest.fixture
def local(state_dir: Path) -> Backend:
    require("local-bubblewrap")
    return make_backend("local-bubblewrap", state_dir)


def test_none_waits_for_ever_and_the_kinds_asked_for_last_share(local: Backend) -> None:
    async def main() -> None:
        async with _opened(local, pool=2, idle_s=4.0) as manager:
            kinds = [SandboxSpec(limits=Limits(memory_mb=100 + n)) for n in range(3)]
            for kind in kinds:
                await manager.create(new_id(), kind)
                await _settled(manager, 2)
            waiting = sorted(box.info.spec.limits.memory_mb for box in manager.pool.waiting)
            assert waiting == [101, 102]
            await _settled(manager, 0)
            assert b'reaps_total{reason="idle"} 2.0' in manager.metrics.text()

    asyncio.run(main())


def test_one_that_died_while_it_waited_is_not_given(local: Backend) -> None:
    async def main() -> None:
        before, after = new_id(), new_id()
        async with _opened(local, pool=1) as manager:
            await manager.create(before, SandboxSpec())
            await _settled(manager, 1)
            dead = manager.pool.waiting[0]
            assert dead.link.agent_pid is not None
            os.kill(dead.link.agent_pid, signal.SIGKILL)
            while not dead.link.is_lost:
                await asyncio.sleep(0.01)
            await manager.create(after, SandboxSpec())
            assert _sources(manager, after) == ["new"]
            assert (await manager.exec(after, ExecRequest("echo in"))).stdout == "in\n"

    asyncio.run(main())


def test_a_kind_that_cannot_be_made_is_given_up(local: Backend) -> None:
    async def main() -> None:
        before, after = new_id(), new_id()
        async with _opened(local, pool=1) as manager:
            await manager.create(before, SandboxSpec())
            await _settled(manager, 1)
            agent = local.agent  # type: ignore[attr-defined]
            agent.rename(agent.with_name("hidden"))
            await manager.create(after, SandboxSpec())
            assert _sources(manager, after) == ["pool"]
            with pytest.raises(SandboxError, match="does not start"):
                await manager.create(new_id(), SandboxSpec())
            agent.with_name("hidden").rename(agent)
            await asyncio.sleep(0.1)
            await manager.create(new_id(), SandboxSpec())
            await _settled(manager, 1)

    asyncio.run(main())


def test_a_killed_service_leaves_the_claimed_to_the_next_and_the_waiting_to_nobody(
    backend: Backend, state_dir: Path
) -> None:
    kind = "docker" if backend.name == "docker" else "local-bubblewrap"

    async def claim(url: str) -> str:
        async with SandboxClient(url) as client:
            first = await client.create()
            while (await client.health())["waiting"] == 0:
                await asyncio.sleep(0.01)
            claimed = await client.create(SandboxSpec(lifetime_s=60))
            await claimed.write("kept", "kept")
            while (await client.health())["waiting"] == 0:
                await asyncio.sleep(0.01)
            await first.close()
            return claimed.id

    async def find(url: str, claimed: str) -> None:
        async with SandboxClient(url) as client:
            assert [info.id for info in await client.list()] == [claimed]
            assert await (await client.attach(claimed)).read("kept") == b"kept"
            kinds = [event.kind for event in await client.log(claimed)]
            assert kinds == ["create", "ready", "write", "adopt", "read"]
            assert len(list(state_dir.glob("*/*/sb-*"))) == 1

    with serving(kind, state_dir, pool=1) as (killed, url):
        claimed = asyncio.run(claim(url))
        killed.kill()
        killed.wait()
    with serving(kind, state_dir) as (again, url):
        asyncio.run(find(url, claimed))
        again.terminate()
        assert again.wait(20) == 0


def test_a_claimed_sandbox_ends_with_the_lifetime_it_was_claimed_for(
    local: Backend, state_dir: Path
) -> None:
    argument = unique_sleep()

    async def main() -> None:
        before, after = new_id(), new_id()
        async with _opened(local, pool=1) as manager:
            await manager.create(before, SandboxSpec())
            await _settled(manager, 1)
            box = manager.pool.waiting[0]
            await manager.create(after, SandboxSpec(lifetime_s=1))
            # The agent's own clock, without a service.
            manager._entries[after].expiry.cancel()
            await manager.open_session(after, "s", SessionRequest())
            await manager.run(after, "s", RunRequest(f"sleep {argument} &"))
            assert await asyncio.to_thread(wait_until, lambda: bool(sleepers(argument)))
            gone = functools.partial(wait_until, timeout_s=15)
            assert await asyncio.to_thread(gone, lambda: not sleepers(argument))
            while not box.link.is_lost:
                await asyncio.sleep(0.01)

    asyncio.run(main())
