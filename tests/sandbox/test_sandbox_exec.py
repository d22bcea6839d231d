"""The contract of commands, the same for every backend."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from sandbox_helpers import Service, in_box, sleepers, unique_sleep, wait_until

from sandbox.client import (
    ExecResult,
    Limits,
    Sandbox,
    SandboxClient,
    SandboxGone,
    SandboxRefused,
    SandboxSessionEnded,
    SandboxSpec,
)

# Ignores SIGTERM, leaves its session and its parent, and holds no pipe.
_DAEMON = """(setsid sh -c 'trap "" TERM HUP; while :; do sleep {0}; done' \
>/dev/null 2>&1 </dev/null &)"""


def test_result_of_a_command(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        command = "cat; echo $A-$B; pwd | sed s,.*/,,; echo oops >&2; exit 3"
        await box.write("sub/x", "")
        result = await box.exec(command, cwd="sub", env={"B": "2"}, stdin="given\n")
        assert (result.exit_code, result.timed_out) == (3, False)
        assert result.stdout == "given\n1-2\nsub\n"
        assert result.stderr == "oops\n"
        assert (result.stdout_bytes, result.stderr_bytes) == (14, 5)
        assert 0 < result.duration_s < 10

    in_box(service.url, body, SandboxSpec(env={"A": "1", "B": "1"}))


def test_standard_input_is_empty_unless_given(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        assert (await box.exec("wc -c", timeout_s=10)).stdout.strip() == "0"
        many = await box.exec("wc -c", stdin="é" * 500_000, timeout_s=10)
        assert many.stdout.strip() == "1000000"

    in_box(service.url, body)


def test_death_by_signal_is_128_plus_its_number(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        assert (await box.exec("kill -9 $$")).exit_code == 137
        assert (await box.exec("exit 255")).exit_code == 255

    in_box(service.url, body)


def test_files_persist_between_commands_and_sandboxes_do_not_share_them(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        save = "echo w >w; echo t >$TMPDIR/klong-t; echo h >$HOME/h"
        assert (await box.exec(save)).exit_code == 0
        show = "cat w $TMPDIR/klong-t $HOME/h"
        assert (await box.exec(show)).stdout == "w\nt\nh\n"
        async with SandboxClient(service.url) as client, await client.create() as other:
            assert (await other.exec(show)).stdout == ""

    in_box(service.url, body)


@pytest.mark.parametrize("ends", ["timeout", "normally"])
def test_whatever_a_command_starts_dies_with_it(service: Service, ends: str) -> None:
    argument = unique_sleep()
    started = " ; ".join(
        [
            _DAEMON.format(argument),
            f"sh -c 'trap \"\" TERM; sleep {argument}; sleep {argument}' &",
            f"nohup sleep {argument} >/dev/null 2>&1 & until [ -e go ]; do sleep 0.05; done",
        ]
    )
    command = started.replace("& ;", "&") + ("; sleep 60" if ends == "timeout" else "")

    async def body(box: Sandbox) -> None:
        running = asyncio.create_task(box.exec(command, timeout_s=3.0 if ends == "timeout" else 30))
        alive = await asyncio.to_thread(wait_until, lambda: len(sleepers(argument)) >= 3)
        assert alive, "the command did not start what the test is about"
        await box.write("go", "")
        result = await running
        assert result.timed_out == (ends == "timeout")
        assert result.exit_code == (None if ends == "timeout" else 0)
        assert await asyncio.to_thread(wait_until, lambda: not sleepers(argument), timeout_s=0.5)
        assert (await box.exec("echo works")).stdout == "works\n"

    in_box(service.url, body)


def test_a_daemon_that_clears_its_environment_dies_too(service: Service) -> None:
    argument = unique_sleep()

    async def body(box: Sandbox) -> None:
        command = f"(env -i setsid setsid -f sleep {argument} >/dev/null 2>&1 &); sleep 60"
        result = await box.exec(command, timeout_s=0.5)
        assert result.timed_out
        assert await asyncio.to_thread(wait_until, lambda: not sleepers(argument), timeout_s=0.5)

    in_box(service.url, body)


def test_a_caller_that_goes_away_takes_its_command_with_it(service: Service) -> None:
    argument = unique_sleep()

    async def body(box: Sandbox) -> None:
        running = asyncio.create_task(box.exec(f"sleep {argument}"))
        assert await asyncio.to_thread(wait_until, lambda: bool(sleepers(argument)))
        running.cancel()
        assert await asyncio.to_thread(wait_until, lambda: not sleepers(argument))

    in_box(service.url, body)


def test_no_moment_of_a_start_is_too_early_to_kill(service: Service) -> None:
    argument = unique_sleep()
    steps = 6 if service.kind == "docker" else 40

    async def body(box: Sandbox) -> None:
        for step in range(steps):
            timeout_s = 0.0005 * (step + 1)
            assert (await box.exec(f"sleep {argument}", timeout_s=timeout_s)).timed_out
        assert await asyncio.to_thread(wait_until, lambda: not sleepers(argument), timeout_s=0.5)

    in_box(service.url, body)


def test_closing_a_sandbox_ends_its_command(service: Service) -> None:
    argument = unique_sleep()

    async def body(box: Sandbox) -> None:
        running = asyncio.create_task(box.exec(f"{_DAEMON.format(argument)}; sleep {argument}"))
        assert await asyncio.to_thread(wait_until, lambda: len(sleepers(argument)) >= 2)
        await box.close()
        with pytest.raises(SandboxGone, match="closed"):
            await running
        assert sleepers(argument) == []

    in_box(service.url, body)


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1000


def test_long_output_keeps_head_and_tail_in_bounded_memory(service: Service) -> None:
    # The service runs in this process: its peak is the service's too.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mb()

    async def body(box: Sandbox) -> None:
        command = "echo BEGIN; head -c 120000000 /dev/zero | tr '\\0' x; echo; echo END; echo e >&2"
        result = await box.exec(command, output_bytes=10_000)
        assert (result.exit_code, result.stderr) == (0, "e\n")
        assert result.stdout_bytes == 120_000_011
        assert result.stdout.startswith("BEGIN\nxxx")
        assert result.stdout.endswith("xxx\nEND\n")
        assert "x\n[... 119990011 bytes left out ...]\nx" in result.stdout
        assert len(result.stdout) < 10_100
        assert _peak_mb() - before < 40

    in_box(service.url, body)


def test_output_without_end_is_cut_at_the_timeout(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        result = await box.exec("yes", timeout_s=0.5)
        assert result.timed_out and result.stdout_bytes > 1_000_000
        assert result.stdout.startswith("y\ny\n") and result.duration_s < 5

    in_box(service.url, body)


def test_output_is_heard_while_the_command_runs(service: Service) -> None:
    command = "echo first; while [ ! -e go ]; do sleep 0.01; done; printf 'é' >&2; seq 100000"

    async def body(box: Sandbox) -> None:
        heard: dict[str, str] = {"stdout": "", "stderr": ""}

        def hear(name: str, text: str) -> None:
            heard[name] += text

        async def go(running: asyncio.Task[ExecResult]) -> ExecResult:
            while heard["stdout"] != "first\n":
                await asyncio.sleep(0.01)
            assert not running.done()
            await box.write("go", "")
            return await running

        one = await go(
            asyncio.create_task(box.exec(command, output_bytes=2000, on_output=hear, timeout_s=9))
        )
        assert one.stdout.startswith(heard["stdout"]) and len(heard["stdout"]) == 1000
        assert heard["stderr"] == one.stderr == "é"
        heard["stdout"] = ""
        await box.exec("rm go")
        async with await box.session() as session:
            running = session.run(command, on_output=hear, timeout_s=9)
            two = await go(asyncio.create_task(running))
            assert two.stdout.startswith(heard["stdout"]) and len(heard["stdout"]) > 1000
            await session.run("exit")
            with pytest.raises(SandboxSessionEnded):
                await session.run("true", on_output=hear)
        with pytest.raises(SandboxRefused):
            await box.exec("true", cwd="../x", on_output=hear)

    in_box(service.url, body)


def test_output_that_is_not_text(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        assert (await box.exec(r"printf 'a\377\000b'")).stdout == "a\ufffd\0b"

    in_box(service.url, body)


_EAT = "python3 -c \"import time; b = b'x' * {0}; print('ate', flush=True); time.sleep(3)\""


def test_memory_is_limited_for_the_sandbox_as_a_whole(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        assert (await box.exec(_EAT.format(40_000_000))).stdout == "ate\n"
        assert (await box.exec(_EAT.format(400_000_000))).exit_code != 0
        one = _EAT.format(40_000_000)
        both = await box.exec(f"({one} && echo ok) & ({one} && echo ok) & wait; wait")
        assert both.stdout.count("ok") < 2
        assert (await box.exec("echo works")).stdout == "works\n"

    in_box(service.url, body, SandboxSpec(limits=Limits(memory_mb=72)))


def test_processes_are_limited(service: Service) -> None:
    fork = "n=0; while [ $n -lt {0} ]; do sleep 3 & n=$((n+1)); done; echo all"

    async def body(box: Sandbox) -> None:
        few = await box.exec(fork.format(16))
        assert few.stdout == "all\n"
        many = await box.exec(fork.format(60))
        assert many.exit_code != 0 and "fork" in many.stderr
        bomb = await box.exec("bomb() { bomb | bomb & }; bomb; sleep 60", timeout_s=1)
        assert bomb.timed_out or bomb.exit_code != 0
        assert (await box.exec("echo works")).stdout == "works\n"

    in_box(service.url, body, SandboxSpec(limits=Limits(pids=40)))


def test_size_of_written_files_is_limited(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        result = await box.exec("head -c 3000000 /dev/zero >big; echo $?; wc -c <big")
        code, size = result.stdout.split()
        assert int(code) != 0 and int(size) <= 2_000_000

    in_box(service.url, body, SandboxSpec(limits=Limits(files_mb=2)))


def test_sixteen_sandboxes_at_once(service: Service) -> None:
    count = 4 if service.kind == "docker" else 16

    async def main() -> None:
        async with SandboxClient(service.url) as client:
            boxes = await asyncio.gather(*[client.create() for _ in range(count)])
            assert len({box.id for box in boxes}) == count

            async def work(number: int, box: Sandbox) -> str:
                for step in range(3):
                    await box.exec(f"echo {number}.{step} >>log")
                return (await box.exec("cat log")).stdout

            logs = await asyncio.gather(*[work(*pair) for pair in enumerate(boxes)])
            assert logs == ["".join(f"{n}.{step}\n" for step in range(3)) for n in range(count)]
            await asyncio.gather(*[box.close() for box in boxes])

    asyncio.run(main())


def test_commands_of_one_sandbox_do_not_disturb_each_other(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        results = await asyncio.gather(
            box.exec("sleep 0.6; echo slow"),
            box.exec("sleep 60", timeout_s=0.2),
            *[box.exec(f"echo {n}") for n in range(4)],
        )
        assert [r.stdout for r in results] == ["slow\n", "", *[f"{n}\n" for n in range(4)]]
        assert [r.timed_out for r in results] == [False, True, *[False] * 4]

    in_box(service.url, body)


def test_what_an_isolated_command_cannot_do(service: Service) -> None:
    if not service.isolated:
        return  # Plain processes are not, and say so: see the test below.
    port = service.url.rpartition(":")[2]
    tries = {
        "become root": "[ $(id -u) = 0 ]",
        "hold a capability": "! grep -q '^CapEff:\t0000000000000000$' /proc/self/status",
        "gain privileges": "grep -q '^NoNewPrivs:\t0' /proc/self/status",
        "set a kernel parameter": "echo x >/proc/sys/kernel/core_pattern",
        "write outside of its places": "touch /x /usr/x /etc/x",
        "read the host's secrets": "cat /etc/shadow || ls /root/.ssh /work /home/*/.ssh",
        "see processes of the host": "grep -l pytes[t] /proc/[0-9]*/cmdline",
        "reach this service": 'python3 -c "import socket; '
        f"socket.create_connection(('127.0.0.1', {port}), 2)\"",
        "have another network": "[ $(ls /sys/class/net 2>/dev/null | grep -vc '^lo$') -gt 0 ]",
        "make a device": "mknod d b 259 0",
        "mount": "mount -t tmpfs none /tmp || unshare -Urm mount -t tmpfs none /tmp",
    }

    async def body(box: Sandbox) -> None:
        for what, command in tries.items():
            result = await box.exec(f"({command}) >/dev/null 2>&1")
            assert result.exit_code != 0, f"a command can {what}"

    in_box(service.url, body)


def test_isolation_is_named_everywhere(service: Service) -> None:
    named = {"local-bubblewrap": "bubblewrap", "local-plain": "none", "docker": "docker"}

    async def body(box: Sandbox) -> None:
        assert box.info.isolation == named.get(service.kind, box.info.isolation)
        async with SandboxClient(service.url) as client:
            assert (await client.health())["isolation"] == box.info.isolation

    in_box(service.url, body)


def test_bad_commands_are_refused(service: Service) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"command": "true", "timeout_s": 0}, "timeout_s"),
        ({"command": "true", "env": {"A=B": "x"}}, "env"),
        ({"command": "a\0b"}, "command"),
        ({"command": "true", "cwd": "../.."}, "path"),
        ({"command": "true", "output_bytes": 10**9}, "output_bytes"),
        ({"command": "x" * 3_000_000}, "command"),
    ]

    async def body(box: Sandbox) -> None:
        for arguments, field in bad:
            with pytest.raises(SandboxRefused, match=f"^{field}"):
                await box.exec(**arguments)
        assert (await box.exec(f": {'x' * 100_000}; echo long")).stdout == "long\n"

    in_box(service.url, body)
