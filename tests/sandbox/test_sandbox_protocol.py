"""Frames, and the service's end of the line against an agent that says anything."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandbox.agent.results import Results
from sandbox.api import ExecRequest, SandboxInfo
from sandbox.backends.box import Box
from sandbox.dialled import DialledLink
from sandbox.errors import SandboxError, SandboxGone, SandboxLost, SandboxRefused
from sandbox.files import HostFiles
from sandbox.protocol import MAX_HEADER, Decoder, ProtocolError, encode
from sandbox.spec import SandboxSpec

_HEADERS = st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.text()))


@settings(deadline=None)
@given(st.lists(st.tuples(_HEADERS, st.binary(max_size=300))), st.integers(1, 50))
def test_frames_survive_any_cut(frames: list[tuple[dict[str, object], bytes]], step: int) -> None:
    stream = b"".join(encode(header, payload) for header, payload in frames)
    decoder = Decoder(1000)
    read = []
    for start in range(0, len(stream), step):
        read += decoder.feed(stream[start : start + step])
    assert read == frames


@pytest.mark.parametrize(
    "stream",
    [
        b"\0\0\0\x01\0\0\0\0[",
        encode({}).replace(b"{}", b"[]"),
        (MAX_HEADER + 1).to_bytes(4, "big") + bytes(4),
        bytes(4) + (1001).to_bytes(4, "big"),
        b"\0\0\0\x01\0\0\0\0\xff",
        b"\0\1\0\0\0\0\0\0" + b"[" * 65536,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_frame_is_refused(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        Decoder(1000).feed(stream)


class _Agent:
    """An agent of the test's own: this process, which the line takes for the sandbox's."""

    def __init__(self, directory: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(directory / "agent.sock"))
        self.socket.setblocking(False)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def request(self) -> dict[str, object]:
        decoder = Decoder(1 << 20)
        while True:
            data = await asyncio.get_running_loop().sock_recv(self.socket, 1 << 16)
            for header, _ in decoder.feed(data):
                return header


async def _line(directory: Path) -> tuple[DialledLink, _Agent]:
    link = DialledLink(directory, owner=None, max_payload=1000)
    agent = _Agent(directory)
    await agent.send(encode({"hello": 1}))
    await link.listen(lambda pid: pid == os.getpid())
    await link.dialled()
    return link, agent


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff" * 100,
        encode({"hello": 99}),
        encode({"id": "a"}, bytes(100_000)),
        encode({"id": "a", "stream": "stdout"}, bytes(40_000)) * 2,
        encode({"id": "a", "stream": "stdin"}, b"x"),
        encode({"id": "a", "stream": ["stdout"]}),
        bytes(4) + (1 << 31).to_bytes(4, "big"),
    ],
)
def test_an_agent_that_breaks_the_protocol_loses_the_sandbox(answer: bytes) -> None:
    async def main(directory: Path) -> None:
        link, agent = await _line(directory)
        heard = bytearray()
        call = link.call(
            {"op": "exec", "id": "a"}, timeout_s=5, on_output=lambda _, data: heard.extend(data)
        )
        asked = asyncio.create_task(call)
        await agent.request()
        await agent.send(answer)
        with pytest.raises(SandboxLost):
            await asked
        assert len(heard) <= 66_536
        with pytest.raises(SandboxLost):
            await link.call({"op": "exec"}, timeout_s=5)

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(Path(directory)))


_OPERATION = "op-00000001"
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=4,
)
_SIZES = st.lists(st.integers(-5, 50) | _JSON, max_size=4)
# A whole result, and what may stand in place of a part of it.
_RESULT: dict[str, object] = {
    "id": _OPERATION,
    "exit": 0,
    "out": [1, 0, 1],
    "err": [0, 0, 0],
    "duration": 0.5,
    "timed_out": False,
}
_ALMOST = st.builds(
    lambda name, value: {**_RESULT, name: value}, st.sampled_from(list(_RESULT)), _JSON
)
_ANY = st.fixed_dictionaries(
    {},
    optional={
        "id": st.just(_OPERATION) | _JSON,
        "hello": st.just(1) | _JSON,
        "stream": st.sampled_from(["stdout", "stderr"]) | _JSON,
        "error": st.sampled_from(["refused", "lost"]) | _JSON,
        "message": _JSON,
        "exit": st.integers(-1, 256) | _JSON,
        "out": _SIZES | _JSON,
        "err": _SIZES | _JSON,
        "duration": st.floats() | _JSON,
        "timed_out": _JSON,
    },
)


@example([({**_RESULT, "duration": 10**400}, b"x")], b"")
@example([({**_RESULT, "out": [1, 0, float("inf")]}, b"x")], b"")
@example([({**_RESULT, "out": [5, -4, 1]}, b"x")], b"")
@example([({**_RESULT, "exit": True}, b"x")], b"")
@example([(_RESULT, b"x")], b"")
@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(_ANY | _ALMOST, st.binary(max_size=100)), max_size=4), st.binary(max_size=40)
)
def test_whatever_an_agent_says_is_a_result_or_an_error(
    frames: list[tuple[dict[str, object], bytes]], garbage: bytes
) -> None:
    async def main(directory: Path) -> None:
        strange: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, told: strange.append(told))
        link, agent = await _line(directory)
        info = SandboxInfo("sb-12345678", "local", "none", 0.0, 1.0, SandboxSpec())
        workspace = HostFiles(directory, owner=None, max_bytes=1)
        box = Box(info, workspace, link, close=lambda: asyncio.sleep(0))
        request = ExecRequest("true", operation=_OPERATION)
        asked = asyncio.create_task(box.exec(request, lambda _name, _data: None))
        await agent.request()
        with suppress(OSError):
            await agent.send(b"".join(encode(*frame) for frame in frames) + garbage)
        agent.socket.close()
        await asyncio.wait([asked], timeout=0.02)
        link.fail(SandboxLost("over."))
        with suppress(SandboxError):
            result = await asked
            assert type(result.exit_code) in (int, type(None)) and type(result.duration_s) is float
            for text, size in (
                (result.stdout, result.stdout_bytes),
                (result.stderr, result.stderr_bytes),
            ):
                assert 0 <= size < 1 << 63 and (size > 0 or not text)
        await asyncio.sleep(0)
        assert strange == []

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(Path(directory)))


def test_answers_to_nobody_are_ignored_and_errors_have_their_kind() -> None:
    async def main(directory: Path) -> None:
        link, agent = await _line(directory)
        asked = asyncio.create_task(link.call({"op": "exec", "id": "a"}, timeout_s=5))
        await agent.request()
        for noise in ({"id": "b"}, {}, {"id": None}, {"id": ["a"]}):
            await agent.send(encode(noise))
        await agent.send(encode({"id": "a", "error": "refused", "message": "no."}))
        with pytest.raises(SandboxRefused, match="no"):
            await asked
        asked = asyncio.create_task(link.call({"op": "exec", "id": "c"}, timeout_s=5))
        assert (await agent.request())["ack"] == ["a"]
        await agent.send(encode({"id": "c", "error": "of a kind of its own"}))
        with pytest.raises(SandboxError):
            await asked
        link.fail(SandboxGone("over"))

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(Path(directory)))


def test_requests_survive_a_broken_connection_and_end_with_the_agent() -> None:
    async def main(directory: Path) -> None:
        link, agent = await _line(directory)
        asked = asyncio.create_task(link.call({"op": "exec", "id": "a"}, timeout_s=9))
        await agent.request()
        agent.socket.close()
        again = _Agent(directory)
        await again.send(encode({"hello": 1}))
        assert (await again.request())["id"] == "a"
        await again.send(encode({"id": "a", "said": 1}))
        assert (await asked)[0]["said"] == 1
        asked = asyncio.create_task(link.call({"op": "exec"}, timeout_s=9))
        await again.request()
        again.socket.close()
        with pytest.raises(SandboxLost, match="gone"):
            await asked

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(Path(directory)))


def test_an_agent_that_does_not_answer_is_not_waited_for() -> None:
    async def main(directory: Path) -> None:
        link, agent = await _line(directory)
        with pytest.raises(SandboxLost, match="does not answer"):
            await link.call({"op": "exec"}, timeout_s=0.1)
        link.fail(SandboxGone("over"))
        agent.socket.close()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(Path(directory)))


def test_results_are_kept_until_acknowledged_and_never_run_twice() -> None:
    results = Results()
    results.add("a", b"x")
    assert results.get("a") == b"x" and results.get("b") is None
    results.acknowledge("a")
    results.acknowledge("a")
    assert results.get("a") is None
    for n in range(12):
        results.add(f"big{n}", bytes(1 << 20))
    assert b'"gone"' in (results.get("big0") or b"")
    assert results.get("big11") == bytes(1 << 20)
