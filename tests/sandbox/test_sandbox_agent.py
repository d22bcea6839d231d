"""The agent against what runs beside it, the same for every backend."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from sandbox_helpers import Service, in_box, sleepers, unique_sleep, wait_until

from sandbox.client import Limits, Sandbox, SandboxClient, SandboxLost, SandboxRefused, SandboxSpec

_POSE = """
import os, socket, struct
for path in ('/run/klong/line/agent.sock', '../../line/agent.sock'):
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path)
    except FileNotFoundError:
        continue
    hello = b'{"hello": 1, "pid": 1}'
    try:
        sock.sendall(struct.pack('>II', len(hello), 0) + hello)
        print(sock.recv(100) or 'refused')
    except OSError:
        print('refused')
"""


def test_only_the_agent_itself_is_taken_for_it(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        await box.write("pose.py", _POSE)
        assert (await box.exec("python3 pose.py")).stdout == "refused\n"
        assert (await box.exec("echo works")).stdout == "works\n"

    in_box(service.url, body)


def test_the_agent_cannot_be_read_traced_or_killed(service: Service) -> None:
    if not service.isolated:
        return  # There it is a process as others.
    tries = {
        "read its environment": "cat /proc/1/environ",
        "read its memory": "head -c 1 /proc/1/mem",
        "open its descriptors": "ls /proc/1/fd/",
        "see where it is": "readlink /proc/1/cwd",
        "change its code": "touch /run/klong/agent/x /run/klong/line/x "
        "|| rm -f /run/klong/line/agent.sock && [ ! -e /run/klong/line/agent.sock ]",
        "gain from set-uid": "grep -q '^NoNewPrivs:\t0' /proc/self/status",
    }

    async def body(box: Sandbox) -> None:
        for what, command in tries.items():
            result = await box.exec(f"({command}) >/dev/null 2>&1")
            assert result.exit_code != 0, f"a command can {what}"
        # Those of one user may starve each other: it harms itself, and hears of it.
        assert (await box.exec("prlimit --pid 1 --nofile=8:8")).exit_code == 0
        for _ in range(3):
            starved = await box.exec("true", stdin="x")
            assert starved.exit_code == 126 and "Too many open files" in starved.stderr

    in_box(service.url, body)


def test_signals_to_the_agent_are_not_heard(service: Service) -> None:
    if not service.isolated:
        return

    async def body(box: Sandbox) -> None:
        for signal in ("KILL", "STOP", "TERM", "INT", "SEGV", "CHLD", "USR1", "PIPE"):
            await box.exec(f"kill -{signal} 1")
        assert (await box.exec("echo works")).stdout == "works\n"

    in_box(service.url, body)


def test_killing_everybody_ends_commands_and_not_the_sandbox(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        session = await box.session()
        other = asyncio.create_task(box.exec("sleep 30 & echo >one; wait"))
        in_session = asyncio.create_task(session.run("sleep 30 & echo >two; wait"))
        await box.exec("until [ -e one ] && [ -e two ]; do sleep 0.05; done")
        if not service.isolated:
            # The agent is no first process there: the sandbox ends, and says so.
            with pytest.raises(SandboxLost, match="ended by itself"):
                await box.exec("kill -9 -1; sleep 5")
            with pytest.raises(SandboxLost):
                await box.exec("true")
            results = await asyncio.gather(other, in_session, return_exceptions=True)
            assert all(isinstance(error, SandboxLost) for error in results)
            return
        assert (await box.exec("kill -9 -1; sleep 5")).exit_code == 137
        assert (await other).exit_code == 137
        ended = await in_session
        assert (ended.exit_code, ended.ended) == (137, True)
        assert (await box.exec("echo works")).stdout == "works\n"

    in_box(service.url, body)


def test_a_command_that_attacks_its_supervisor_gains_nothing(service: Service) -> None:
    argument = unique_sleep()
    daemon = f"(env -i setsid setsid -f sleep {argument} >/dev/null 2>&1); sleep 0.1"

    async def body(box: Sandbox) -> None:
        killed = await box.exec(f"{daemon}; kill -9 $PPID; sleep 5")
        assert (killed.exit_code, killed.timed_out) == (137, False)
        assert not sleepers(argument)
        for number in ("TERM", "HUP", "INT", "USR1", "TSTP", "ALRM"):
            assert (await box.exec(f"kill -{number} $PPID; echo on")).stdout == "on\n", number
        stopped = await box.exec(f"{daemon}; kill -STOP $PPID", timeout_s=0.5)
        assert stopped.timed_out
        assert not sleepers(argument)
        assert (await box.exec("echo works")).stdout == "works\n"

    in_box(service.url, body)


def test_nothing_is_left_of_the_dead(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        await box.exec("for n in 1 2 3 4 5; do (setsid sh -c 'sleep 0.01' &); done; sleep 0.1")
        await box.exec("(setsid sleep 5 &); exit 3")
        await box.exec("(setsid sleep 5 &); sleep 5", timeout_s=0.1)
        zombies = "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ' Z '"
        if service.isolated:
            assert (await box.exec(zombies)).stdout == "0\n"
        descriptors = "ls /proc/self/fd | wc -l"
        assert (await box.exec(descriptors)).stdout == "4\n"

    in_box(service.url, body)


def test_a_sandbox_out_of_processes_says_so(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        fill = "while :; do sleep 30 & done"
        filling = asyncio.create_task(box.exec(f"sh -c '{fill}' 2>/dev/null; sleep 30"))
        await asyncio.sleep(1)
        # Which of the two it is depends on whether one can be started to fail.
        results = [await box.exec("echo a & echo b & wait") for _ in range(3)]
        assert all(result.exit_code != 0 for result in results)
        assert all("cannot" in r.stderr.lower() or "fork" in r.stderr for r in results)
        filling.cancel()
        for _ in range(100):
            works = await box.exec("echo works")
            if works.exit_code == 0:
                break
            await asyncio.sleep(0.02)
        assert works.stdout == "works\n"

    in_box(service.url, body, SandboxSpec(limits=Limits(pids=30)))


def test_sessions_are_limited(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        with pytest.raises(SandboxRefused, match="session"):
            await asyncio.gather(*[box.session() for _ in range(70)])
        assert (await box.exec("echo works")).stdout == "works\n"

    in_box(service.url, body, SandboxSpec(limits=Limits(pids=512)))


def test_an_operation_that_is_asked_for_again_runs_once(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        url = f"{service.url}/sandboxes/{box.id}/exec"

        async def ask(session: aiohttp.ClientSession, operation: str, ack: str = "") -> str:
            request = {"command": "echo x >>log; sleep 0.2; wc -l <log", "operation": operation}
            more = {"acknowledge": [ack]} if ack else {}
            async with session.post(url, json={**request, **more}) as answer:
                return str((await answer.json())["stdout"])

        async with aiohttp.ClientSession() as session:
            # At once, after it, and by a caller whose connection broke.
            assert (
                await asyncio.gather(*[ask(session, "op-one-000") for _ in range(3)]) == ["1\n"] * 3
            )
            assert await ask(session, "op-one-000") == "1\n"
            broken = asyncio.create_task(ask(session, "op-two-000"))
            await asyncio.sleep(0.1)
            broken.cancel()
            await asyncio.wait([broken])
            assert await ask(session, "op-two-000") == "2\n"
            assert await ask(session, "op-three-0", ack="op-two-000") == "3\n"

    in_box(service.url, body)


def test_a_reconnecting_caller_that_cancels_ends_its_command(service: Service) -> None:
    argument = unique_sleep()

    async def main() -> None:
        async with (
            SandboxClient(service.url, reconnect_s=5) as client,
            await client.create() as box,
        ):
            running = asyncio.create_task(box.exec(f"sleep {argument}"))
            assert await asyncio.to_thread(wait_until, lambda: bool(sleepers(argument)))
            running.cancel()
            assert await asyncio.to_thread(wait_until, lambda: not sleepers(argument))
            assert [(await box.exec(f"echo {n}")).stdout for n in range(3)] == ["0\n", "1\n", "2\n"]

    asyncio.run(main())
