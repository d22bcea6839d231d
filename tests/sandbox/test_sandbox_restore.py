"""The contract of snapshots: a fresh sandbox has the files and the sessions, no processes."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from pathlib import Path

import pytest
from sandbox_helpers import (
    Service,
    in_box,
    make_backend,
    require,
    serving,
    sleepers,
    unique_sleep,
    wait_until,
)

from sandbox.__main__ import main
from sandbox.client import (
    Limits,
    Sandbox,
    SandboxClient,
    SandboxGone,
    SandboxRefused,
    SandboxSnapshotMissing,
    SandboxSpec,
    SandboxTooLarge,
    SandboxUnavailable,
)
from sandbox.service import embedded

_MAKE = """
    mkdir -p src/deep ro; cd src/deep; echo hi >f; ln f g; chmod 640 f; touch -d @915148800 f
    ln -s /etc/passwd out; mkfifo ../../p; echo data >"$(printf 'b\\377d')"; truncate -s 3M sparse
    echo rc >~/.rc; echo gone >$TMPDIR/gone; echo x >../../ro/x; chmod 555 ../../ro
"""
_SHOW = """
    stat -c '%n %a %h %Y %s %F' * ../../ro; (cd ~; stat -c '%a %Y' .rc); cat f ~/.rc; readlink out
    ls $TMPDIR; ls ../..
"""


def test_a_fresh_sandbox_begins_where_another_was(service: Service) -> None:
    argument = unique_sleep()

    async def body(box: Sandbox) -> None:
        client = box._client
        work = await box.session("work", env={"OPENED": "with"})
        assert (await work.run(_MAKE)).exit_code == 0
        await work.run("export SEED='a\nb' OWN=mine; unset LANG; mine=1; f() { :; }; set -eux")
        await work.run(f"export -f f 2>/dev/null || :; setsid -f sleep {argument}")
        lost = await box.session("lost")
        await lost.run("mkdir $TMPDIR/d; cd $TMPDIR/d; export KEPT=1")
        dead = await box.session("dead")
        await dead.run("exit")
        shown = (await work.run(_SHOW)).stdout
        assert " 915148800 " in shown and "\nd\ngone\np\nro\n" in shown

        info = await box.snapshot()
        assert (info.files, info.skipped, info.sandbox) == (5, 1, box.id)
        assert info.lost_processes == 1 and sleepers(argument)
        place = "/workspace/src/deep"
        assert {(s.name, s.cwd, s.whole) for s in info.sessions} == {
            ("work", place, True),
            ("lost", "/tmp/d", True),
        }
        # The sandbox goes on as if nothing had been.
        assert (await work.run("echo $mine; (set -o | grep errexit)")).stdout.split()[::2] == [
            "1",
            "on",
        ]
        assert (await box.snapshot()).digest == info.digest
        await box.close()

        spec = SandboxSpec(snapshot=info.digest, env={"OWN": "not mine", "NEW": "1"})
        async with await client.create(spec) as fresh:
            work, lost = (fresh.attach_session(name) for name in ("work", "lost"))
            # Neither what was in /tmp, nor the pipe.
            expected = shown.replace("\nd\ngone\np\nro\n", "\nro\n")
            assert (await work.run(_SHOW)).stdout == expected
            said = await work.run('echo "$SEED" $OPENED $OWN $NEW ${LANG-none} ${mine-none}')
            assert said.stdout == "a\nb with mine 1 none none\n"
            # Where its directory was lost, a session is in the workspace.
            place = (await fresh.exec("pwd")).stdout
            assert (await lost.run("pwd; echo $KEPT")).stdout == f"{place}1\n"
            assert (await fresh.exec("rm -r src && mv ro or")).exit_code == 0
            assert not sleepers(argument)
            kinds = [event.kind for event in await client.log(fresh.id)]
            assert kinds[:3] == ["create", "restore", "ready"]
        await client.delete_snapshot(info.digest)
        with pytest.raises(SandboxSnapshotMissing, match=info.digest):
            await client.create(spec)

    in_box(service.url, body, SandboxSpec(env={"OWN": "sandbox's"}))


def test_a_busy_session_keeps_what_can_be_known(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        busy = await box.session("busy", env={"OPENED": "with"})
        await busy.run("mkdir d; cd d; export LATER=1")
        running = asyncio.create_task(busy.run("touch started; sleep 60", timeout_s=60))
        # A shell that never answers is no reason to wait for it.
        mute = await box.session("mute")
        await mute.run("command() { sleep 60; }; mkdir m; cd m")
        while not (await box.exec("ls d")).stdout:
            pass
        info = await box.snapshot()
        assert {(s.name, s.cwd, s.whole) for s in info.sessions} == {
            ("busy", "/workspace/d", False),
            ("mute", "/workspace/m", False),
        }
        assert not running.done() and info.lost_processes >= 2
        async with await box._client.create(SandboxSpec(snapshot=info.digest)) as fresh:
            said = await fresh.attach_session("busy").run("basename $PWD; echo $OPENED$LATER")
            assert said.stdout == "d\nwith\n"

    in_box(service.url, body)


def test_a_paused_sandbox_is_kept_as_it_stands(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        session = await box.session("work")
        await session.run("mkdir d; cd d; export A=1")
        wait = "touch ~/begun; until [ -e go ]; do sleep 0.05; done; echo late >late"
        running = asyncio.create_task(box.exec(wait))
        while (await box.exec("ls ~/begun")).exit_code:
            pass
        await box.pause()
        info = await box.snapshot()
        assert info.frozen and info.files == 1 and info.sessions[0].whole
        await box.resume()
        await box.write("go", "")
        assert (await running).exit_code == 0 and await box.read("late") == b"late\n"
        async with await box._client.create(SandboxSpec(snapshot=info.digest)) as fresh:
            said = await fresh.attach_session("work").run("pwd; echo $A; ls -A ..")
            assert said.stdout.splitlines()[1:] == ["1", "d"]

    in_box(service.url, body)


_HOSTILE = """
    while :; do
        mkdir a 2>/dev/null && echo mine >a/passwd; mv a b; ln -s /etc a; rm a; mv b a; rm -r a
        ln -s / a; rm a; mkfifo a; rm a
    done
"""


def test_a_tree_that_fights_back_gives_nothing_of_the_host(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        session = await box.session()
        await session.run(f"{{ {_HOSTILE} }} >/dev/null 2>&1 & ln -s /etc/passwd ~/passwd")
        for _ in range(5):
            info = await box.snapshot()
            assert info.bytes in (0, len("mine\n"))
        async with await box._client.create(SandboxSpec(snapshot=info.digest)) as fresh:
            said = await fresh.exec("find . ~ -type f -exec cat {} +; readlink ~/passwd")
            assert said.stdout.removeprefix("mine\n") == "/etc/passwd\n"

    in_box(service.url, body)


def test_what_is_too_large_is_refused_before_anything_is_made(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        client = box._client
        await box.exec("head -c 1900000 /dev/urandom >a")
        info = await box.snapshot()
        await box.exec("cp a ~/b")
        with pytest.raises(SandboxTooLarge, match="limit of 2000000 bytes"):
            await box.snapshot()
        await box.exec("rm ~/b; d=$(printf 'd/%.0s' $(seq 150)); mkdir -p $d")
        with pytest.raises(SandboxTooLarge, match="deeper than 100"):
            await box.snapshot()
        assert [one.digest for one in await client.snapshots()].count(info.digest) == 1
        living = len(await client.list())
        for digest, error in (("0" * 64, SandboxSnapshotMissing), ("no", SandboxRefused)):
            with pytest.raises(error):
                await client.create(SandboxSpec(snapshot=digest))
        assert len(await client.list()) == living

    in_box(service.url, body, SandboxSpec(limits=Limits(files_mb=2)))


def test_a_snapshot_that_has_no_room_is_refused(state_dir: Path) -> None:
    require("local-bubblewrap")

    async def work(url: str) -> None:
        async with SandboxClient(url) as client, await client.create() as box:
            await box.exec("head -c 9000000 /dev/urandom >a")
            digest = (await box.snapshot()).digest
            limits = Limits(disk_mb=8)
            with pytest.raises(SandboxTooLarge, match=r"limits.disk_mb: 8 is too little"):
                await client.create(SandboxSpec(snapshot=digest, limits=limits))
            await box.exec("rm a; for n in $(seq 200); do echo >$n; done")
            digest = (await box.snapshot()).digest
            limits = Limits(disk_mb=8, inodes=64)
            with pytest.raises(SandboxTooLarge, match=r"raise its limits.disk_mb and limits.inod"):
                await client.create(SandboxSpec(snapshot=digest, limits=limits))
            assert len(await client.list()) == 1

    with embedded("local", state_dir=state_dir) as url:
        asyncio.run(work(url))


def test_a_warm_sandbox_is_claimed_and_filled(state_dir: Path) -> None:
    require("local-bubblewrap")

    async def work(url: str) -> None:
        async with SandboxClient(url) as client, await client.create() as box:
            await (await box.session("work")).run("echo 1 >kept; export A=1")
            digest = (await box.snapshot()).digest
            while (await client.health())["waiting"] == 0:
                await asyncio.sleep(0.01)
            async with await client.create(SandboxSpec(snapshot=digest)) as fresh:
                assert (await fresh.attach_session("work").run("cat kept; echo $A")).stdout == (
                    "1\n1\n"
                )
                ready = next(e for e in await client.log(fresh.id) if e.kind == "ready")
                assert ready.facts["source"] == "pool"

    with embedded("local", state_dir=state_dir, pool=1) as url:
        asyncio.run(work(url))


def test_closing_a_sandbox_ends_its_snapshot(service: Service) -> None:
    async def body(box: Sandbox) -> None:
        await box.exec("for n in $(seq 1500); do echo $n >$n; done")
        taking = asyncio.create_task(box.snapshot())
        await asyncio.sleep(0.1)
        await box.close()
        # Or it was there before.
        taken = None
        with suppress(SandboxGone):
            taken = await taking
        kept = [one.digest for one in await box._client.snapshots() if one.sandbox == box.id]
        assert kept == ([] if taken is None else [taken.digest])
        assert taken is None or taken.files == 1500

    in_box(service.url, body)


def _blobs(state_dir: Path) -> list[Path]:
    return list(state_dir.glob("*/snapshots/blobs/*/*"))


def test_a_service_killed_in_the_middle_leaves_no_half_snapshot_and_no_half_sandbox(
    kind: str, state_dir: Path
) -> None:
    argument = unique_sleep()

    async def taking(url: str) -> tuple[str, str]:
        async with SandboxClient(url) as client:
            box = await client.create()
            await (await box.session("work")).run(f"sleep {argument} &")
            whole = await box.snapshot()
            await box.exec("for n in $(seq 1500); do echo $n >$n; done")
            task = asyncio.create_task(box.snapshot())
            assert await asyncio.to_thread(wait_until, lambda: bool(_blobs(state_dir)))
            killed.kill()
            killed.wait()
            with pytest.raises(SandboxUnavailable):
                await task
            return box.id, whole.digest

    async def restoring(url: str, sandbox_id: str, whole: str) -> None:
        async with SandboxClient(url) as client:
            # It was frozen when its service was killed, and nobody had paused it.
            box = await client.attach(sandbox_id)
            assert box.info.paused_at is None
            assert (await box.attach_session("work").run("ls | wc -l")).stdout == "1500\n"
            assert [info.digest for info in await client.snapshots()] == [whole]
            assert not _blobs(state_dir)
            digest = (await box.snapshot()).digest
            task = asyncio.create_task(client.create(SandboxSpec(snapshot=digest)))
            filled = "*/*/sb-*/data/workspace/1"
            assert await asyncio.to_thread(
                wait_until, lambda: len(list(state_dir.glob(filled))) == 2
            )
            again.kill()
            again.wait()
            with pytest.raises(SandboxUnavailable):
                await task
            assert len(list(state_dir.glob("*/*/sb-*"))) == 2

    with serving(kind, state_dir) as (killed, url):
        sandbox_id, whole = asyncio.run(taking(url))
    with serving(kind, state_dir) as (again, url):
        asyncio.run(restoring(url, sandbox_id, whole))
    with serving(kind, state_dir) as (last, _):
        assert [path.name for path in state_dir.glob("*/*/sb-*")] == [sandbox_id]
        last.terminate()
        assert last.wait(15) == 0
    assert not sleepers(argument)


def test_snapshots_are_taken_listed_and_dropped_from_a_terminal(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*words: str) -> tuple[int, str, str]:
        status = main([*words, "--url", service.url])
        return status, *capsys.readouterr()

    async def body(box: Sandbox) -> None:
        session = await box.session("work")
        await session.run("echo 1 >kept; mkfifo p; sleep 60 &")

        def administrate() -> None:
            status, out, err = ask("snapshot", box.id)
            assert status == 0 and re.fullmatch("[0-9a-f]{64}\n", out)
            assert err == "not in it: 1 processes; 1 pipes, sockets or devices\n"
            digest = out.strip()
            status, out, _ = ask("snapshots")
            row = next(line for line in out.splitlines() if line.startswith(digest)).split()
            assert row[3:] == ["1", "0.0", "MB", "1", box.id]
            assert ask("drop", digest) == (0, f"{digest}\n", "")
            status, _, err = ask("drop", digest)
            assert status == 1 and err.startswith(f"error: there is no snapshot {digest}")
            assert ask("pause", box.id) == (0, f"{box.id}\n", "")
            assert f"{box.id}  paused" in ask("ps")[1]
            assert ask("exec", box.id, "true")[0] == 1
            assert ask("resume", box.id) == (0, f"{box.id}\n", "")
            assert ask("exec", box.id, "true")[0] == 0

        await asyncio.to_thread(administrate)

    in_box(service.url, body)


def test_a_backend_that_has_neither_says_so(kind: str, state_dir: Path) -> None:
    """As one does whose sandboxes are not on this host."""
    backend = make_backend(kind, state_dir)
    create = backend.create

    async def without(info):  # type: ignore[no-untyped-def]
        box = await create(info)
        box.freezer = None
        if info.spec.labels:
            box.tree = None
        return box

    backend.create = without  # type: ignore[method-assign]

    async def work(url: str) -> None:
        async with SandboxClient(url) as client, await client.create() as box:
            with pytest.raises(SandboxRefused, match="cannot stop a sandbox"):
                await box.pause()
            assert (await box.exec("echo alive >alive")).exit_code == 0
            info = await box.snapshot()
            assert info.files == 1 and not info.frozen
            spec = SandboxSpec(labels={"without": "tree"})
            async with await client.create(spec) as other:
                with pytest.raises(SandboxRefused, match="no access to the files"):
                    await other.snapshot()
            spec = SandboxSpec(labels={"without": "tree"}, snapshot=info.digest)
            with pytest.raises(SandboxRefused, match="no access to the files"):
                await client.create(spec)
            assert len(await client.list()) == 1

    with embedded(backend) as url:
        asyncio.run(work(url))
