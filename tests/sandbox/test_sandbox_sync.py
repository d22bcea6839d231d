"""The client for code without an event loop."""

from __future__ import annotations

import asyncio
import inspect
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sandbox_helpers import ROOT, sleepers, unique_sleep, wait_until

from sandbox.client import Sandbox, SandboxClient, SandboxGone, SandboxRefused, SandboxSpec, Session
from sandbox.service import embedded
from sandbox.sync import SyncSandbox, SyncSandboxClient, SyncSession


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with embedded("local") as url:
        yield url


def test_it_does_all_that_the_asynchronous_one_does(url: str) -> None:
    for there, here in (
        (SandboxClient, SyncSandboxClient),
        (Sandbox, SyncSandbox),
        (Session, SyncSession),
    ):
        for name in {name for name in vars(there) if not name.startswith("_")}:
            asked, given = getattr(there, name), getattr(here, name)
            if callable(asked):
                assert inspect.signature(given).parameters == inspect.signature(asked).parameters


def test_sandboxes_sessions_and_files(url: str) -> None:
    with SyncSandboxClient(url) as client:
        with client.create(SandboxSpec(labels={"task": "t"})) as box:
            assert client.attach(box.id).info == box.info == client.list()[0]
            box.upload_tree({"d/x": "x"})
            box.write("d/y", "y")
            assert box.read("d/x") == b"x" and b"d/y" in box.download_tree()
            heard: list[str] = []
            done = box.exec("cat d/x; exit 3", on_output=lambda _, text: heard.append(text))
            assert (done.exit_code, done.stdout, heard) == (3, "x", ["x"])
            with box.session("work") as session:
                session.run("cd d")
                assert box.attach_session(session.name).run("cat y").stdout == "y"
            assert [event.kind for event in client.log(box.id)][:2] == ["create", "ready"]
            assert box.end() is None
        with pytest.raises(SandboxGone, match=box.id):
            box.exec("true")
        assert client.list() == []


def test_threads_share_a_client(url: str) -> None:
    with SyncSandboxClient(url) as client, client.create() as box, ThreadPoolExecutor(8) as pool:
        # Each waits for all: one that held up the others would wait for ever.
        meet = "touch {0}; until [ $(ls | wc -l) -ge 8 ]; do sleep 0.01; done; echo {0}"
        said = pool.map(lambda n: box.exec(meet.format(n), timeout_s=20).stdout, range(8))
        assert list(said) == [f"{n}\n" for n in range(8)]


def test_it_works_where_a_loop_runs_as_in_a_notebook(url: str) -> None:
    async def cell() -> str:
        with SyncSandboxClient(url) as client, client.create() as box:
            return box.exec("echo in").stdout

    assert asyncio.run(cell()) == "in\n"


def test_what_would_wait_for_ever_is_refused(url: str) -> None:
    with SyncSandboxClient(url) as client, client.create() as box:
        with pytest.raises(SandboxRefused, match="on_output"):
            box.exec("echo in", on_output=lambda *_: box.read("x") and None)
        assert box.exec("echo works").stdout == "works\n"
    client.close()
    with pytest.raises(SandboxRefused, match="closed"):
        client.health()
    assert "sandbox-client" not in [thread.name for thread in threading.enumerate()]


_INTERRUPTED = """
import sys
from sandbox.sync import SyncSandboxClient
with SyncSandboxClient(sys.argv[1]) as client, client.create() as box:
    print("ready", flush=True)
    try:
        box.exec(f"sleep {sys.argv[2]}")
    except KeyboardInterrupt:
        print(box.exec("echo interrupted").stdout, end="")
"""


def test_ctrl_c_ends_the_command_and_not_the_client(url: str) -> None:
    argument = unique_sleep()
    command = [sys.executable, "-c", _INTERRUPTED, url, argument]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    inside = lambda: len(sleepers(argument)) > 1  # noqa: E731
    assert wait_until(inside, timeout_s=20)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert (process.returncode, said) == (0, "ready\ninterrupted\n")
    assert sleepers(argument) == []
