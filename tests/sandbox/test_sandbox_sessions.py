"""The contract of sessions, the same for every backend."""

from __future__ import annotations

import asyncio

import pytest
from sandbox_helpers import Service, in_box, sleepers, unique_sleep, wait_until

from sandbox.client import (
    Limits,
    Sandbox,
    SandboxRefused,
    SandboxSessionEnded,
    SandboxSpec,
)


def test_what_a_session_keeps(service: Service) -> None:
    argument = unique_sleep()

    async def body(box: Sandbox) -> None:
        await box.write("sub/x", "")
        async with await box.session(cwd="sub", env={"B": "2"}) as session:
            assert (await session.run("pwd | sed s,.*/,,; echo $A$B")).stdout == "sub\n12\n"
            await session.run('cd ..; C="it\'s"; export C; f() { echo f$1; }; exec 3>&1')
            await session.run(f"sleep {argument} >&2 &")
            seen = await session.run(
                "ls; f 1; sh -c 'echo $C'; echo three >&3; echo e >&2; (exit 5)"
            )
            assert (seen.exit_code, seen.ended, seen.timed_out) == (5, False, False)
            assert seen.stdout == "sub\nf1\nit's\nthree\n" and seen.stderr == "e\n"
            assert sleepers(argument)
        assert not sleepers(argument)
        assert (await box.exec("echo $C")).stdout == "\n"

    in_box(service.url, body, SandboxSpec(env={"A": "1"}))


def test_no_output_is_taken_for_the_end_of_a_command(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        session = await box.session()
        # Nothing to read, nothing to write a status to, no mark to print.
        assert (await session.run("cat; echo read")).stdout == "read\n"
        await session.run("(echo 0 >&9; echo 0 >&8; cat <&8) 2>/dev/null; echo 0; true")
        said = "sleep 0.2; echo EOF; echo 'echo $?'; printf 'no newline'; false"
        result = await session.run(said)
        assert (result.exit_code, result.stdout) == (1, "EOF\necho $?\nno newline")
        assert (await session.run("")).exit_code == 0
        assert (await session.run("echo \"a'b\" $'\\n' # comment")).exit_code == 0
        assert (await session.run("if")).exit_code != 0
        assert (await session.run("echo 'open")).exit_code != 0
        assert (await session.run("cat <<E\nhere\nE")).stdout == "here\n"
        assert (await session.run("echo works")).stdout == "works\n"
        long = await session.run(f": {'x' * 100_000}; echo long")
        assert long.stdout == "long\n"

    in_box(service.url, body)


def test_a_timeout_leaves_the_session_and_its_jobs(service: Service) -> None:
    kept, lost = unique_sleep(), unique_sleep()

    async def body(box: Sandbox) -> None:
        session = await box.session()
        await session.run(f"X=1; sleep {kept} >/dev/null 2>&1 &")
        await asyncio.sleep(0.02)
        daemon = f"(setsid sh -c 'trap \"\" TERM; sleep {lost}; sleep {lost}' >/dev/null 2>&1 &)"
        for hang in (
            f"{daemon}; sleep {lost}; touch undone",
            f"f() {{ sleep {lost}; f; }}; f",
            "while :; do :; done; touch undone",
            f"env -i setsid -f sleep {lost}; trap '' INT; cat /dev/zero >/dev/null; touch undone",
        ):
            result = await session.run(hang, timeout_s=0.4)
            assert (result.timed_out, result.exit_code, result.ended) == (True, None, False), hang
            assert result.duration_s < 5
            assert await asyncio.to_thread(wait_until, lambda: not sleepers(lost), timeout_s=0.5)
        after = await session.run("echo $X; ls")
        assert (after.exit_code, after.stdout) == (0, "1\n")
        assert sleepers(kept)

    in_box(service.url, body)


def test_the_end_of_a_shell_is_the_end_of_its_session(service: Service) -> None:
    argument = unique_sleep()

    async def body(box: Sandbox) -> None:
        for leave, code in (("exit 3", 3), ("kill -9 $$", 137), ("exec true", 0)):
            session = await box.session()
            result = await session.run(f"sleep {argument} >/dev/null 2>&1 & {leave}")
            assert (result.exit_code, result.ended) == (code, True)
            assert not sleepers(argument)
            with pytest.raises(SandboxSessionEnded, match="ended"):
                await session.run("true")
            await session.close()
            await session.close()
            with pytest.raises(SandboxSessionEnded, match="no session"):
                await session.run("true")

    in_box(service.url, body)


def test_a_shell_that_stops_itself_is_killed_at_the_timeout(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        session = await box.session()
        result = await session.run("kill -STOP $$", timeout_s=0.2)
        assert result.timed_out and result.ended and result.duration_s < 5
        assert (await box.exec("echo works")).stdout == "works\n"

    in_box(service.url, body)


def test_sessions_are_many_and_run_one_command_each(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        one, two = await box.session("one"), await box.session("two")
        slow = asyncio.create_task(one.run("sleep 0.5; echo slow"))
        await asyncio.sleep(0.1)
        assert (await two.run("echo quick")).stdout == "quick\n" and not slow.done()
        with pytest.raises(SandboxRefused, match="runs a command"):
            await box.attach_session("one").run("true")
        with pytest.raises(SandboxRefused, match="already"):
            await box.session("one")
        assert (await slow).stdout == "slow\n"
        for name in ("../x", "a/b", "x" * 65, "-"):
            with pytest.raises(SandboxRefused, match=r"^session"):
                await box.session(name)

    in_box(service.url, body)


def test_a_session_that_its_caller_left_is_free_again(service: Service) -> None:
    argument = unique_sleep()

    async def body(box: Sandbox) -> None:
        session = await box.session()
        running = asyncio.create_task(session.run(f"X=1; sleep {argument}; touch undone"))
        assert await asyncio.to_thread(wait_until, lambda: bool(sleepers(argument)))
        running.cancel()
        assert await asyncio.to_thread(wait_until, lambda: not sleepers(argument))
        result = await session.run("echo $X; ls")
        assert result.stdout == "1\n"

    in_box(service.url, body)


def test_limits_hold_in_sessions(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        session = await box.session()
        eat = "python3 -c 'b = bytearray(400_000_000)'; echo $?"
        assert (await session.run(eat)).stdout != "0\n"
        long = await session.run("echo BEGIN; head -c 3000000 /dev/zero | tr '\\0' x; echo END")
        assert long.stdout_bytes == 3_000_010 and len(long.stdout) < 2000
        assert long.stdout.startswith("BEGIN\n") and long.stdout.endswith("END\n")
        # A shell tries again and again to fork.
        fork = "n=0; while [ $n -lt 60 ]; do sleep 9 & n=$((n+1)); done; echo all"
        many = await session.run(fork, timeout_s=1)
        assert many.timed_out and "all" not in many.stdout
        assert (await box.exec("echo works")).stdout == "works\n"

    limits = Limits(memory_mb=100, pids=40, output_bytes=1000)
    in_box(service.url, body, SandboxSpec(limits=limits))
