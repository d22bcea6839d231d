"""What is no request: refused in a sentence, by a service that goes on."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.client import SandboxClient
from sandbox.errors import BY_KIND
from sandbox.service import embedded

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)
_NAMES = [
    "command", "timeout_s", "cwd", "env", "stdin", "output_bytes", "operation", "acknowledge",
    "image", "limits", "labels", "lifetime_s", "idle_s", "network", "reading", "finish_check",
]  # fmt: skip
_FIELDS = st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=4)
_BODIES = st.binary(max_size=200) | (_JSON | _FIELDS).map(lambda value: json.dumps(value).encode())
# Each with a timeout, so that what happens to be a request is no long one.
_ROUTES = [
    ("PUT", "/sandboxes/{any}"),
    ("POST", "/sandboxes/{id}/exec"),
    ("PUT", "/sandboxes/{id}/sessions/{any}"),
    ("POST", "/sandboxes/{id}/sessions/{any}"),
    ("DELETE", "/sandboxes/{id}/operations/{any}"),
    ("POST", "/sandboxes/{id}/reading/{any}"),
    ("PUT", "/sandboxes/{id}/archive"),
    ("PUT", "/sandboxes/{id}/files?path={any}"),
    ("GET", "/sandboxes/{id}/files?path={any}"),
    ("GET", "/sandboxes/{id}/log?after={any}"),
    ("GET", "/sandboxes/{any}"),
    ("POST", "/{any}"),
]


@pytest.fixture(scope="module")
def box() -> Iterator[tuple[str, str]]:
    """The service's address and a sandbox that answers at the end as at first."""

    async def make(url: str) -> str:
        async with SandboxClient(url) as client:
            return (await client.create()).id

    async def still_works(url: str, sandbox_id: str) -> None:
        async with SandboxClient(url) as client:
            again = await client.attach(sandbox_id)
            assert (await again.exec("echo works")).stdout == "works\n"

    with embedded("local") as url:
        sandbox_id = asyncio.run(make(url))
        yield url, sandbox_id
        asyncio.run(still_works(url, sandbox_id))


@settings(deadline=None, max_examples=250)
@given(st.sampled_from(_ROUTES), st.text(max_size=20), _BODIES)
def test_no_request_is_too_strange(
    box: tuple[str, str], route: tuple[str, str], name: str, body: bytes
) -> None:
    method, path = route
    url, sandbox_id = box
    address = path.format(id=sandbox_id, any=quote(name.encode("utf-8", "replace"), safe=""))
    line = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    line.request(method, address, body)
    answer = line.getresponse()
    said = answer.read()
    line.close()
    if answer.status < 400:
        return
    told = json.loads(said)
    assert answer.status < 500 and told["kind"] in BY_KIND and told["infra"] in (True, False)
    assert told["error"].endswith(".") and "\n" not in told["error"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xfe\x00\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"POST /sandboxes/sb-12345678/exec HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT /sandboxes/sb-12345678 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_ends_its_connection_alone(box: tuple[str, str], sent: bytes) -> None:
    async def main() -> None:
        address = urlsplit(box[0])
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(sent)
        writer.write_eof()
        said = await asyncio.wait_for(reader.read(), 20)
        assert said.split(b" ", 2)[1:2] in ([b"400"], [b"431"], [])
        writer.close()

    asyncio.run(main())
