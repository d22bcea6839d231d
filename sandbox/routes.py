"""The service's HTTP routes over a manager."""

from __future__ import annotations

import asyncio
import codecs
import functools
import hmac
import json
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from io import BytesIO
from typing import Any, BinaryIO, ParamSpec

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CONTENT_TYPE_LATEST

from sandbox.api import (
    EndRequest,
    ExecRequest,
    ExecResult,
    RunRequest,
    SessionRequest,
    parse,
    to_json,
)
from sandbox.backends import Backend
from sandbox.egress.settings import EgressSettings
from sandbox.errors import (
    SandboxError,
    SandboxRefused,
    SandboxTooLarge,
    SandboxUnauthorised,
    host_fault,
)
from sandbox.files import Files
from sandbox.link import OnOutput
from sandbox.manager import Manager
from sandbox.spec import Gates, SandboxSpec

log = logging.getLogger("sandbox")

P = ParamSpec("P")

_CHUNK = 1 << 18
_MAX_JSON = 16_000_000
_MAX_EVENTS = 1_000

_MANAGER = web.AppKey("manager", Manager)


def create_app(
    backend: Backend,
    *,
    token: str | None = None,
    pool: int = 0,
    pool_idle_s: float = 600.0,
    egress: EgressSettings | None = None,
    disk_mb: int = 0,
) -> web.Application:
    """The application over a backend; it starts the backend and removes every sandbox at its end.

    Args:
        backend: Not started yet.
        token: Bearer token that every request but `/health` must carry; None asks for none.
        pool: Sandboxes that are kept ready, of the kinds asked for last.
        pool_idle_s: Seconds that one is kept ready.
        egress: How sandboxes are let out that ask for it.
        disk_mb: `limits.disk_mb` of sandboxes that ask for none; 0 leaves them without.
    """
    middlewares: list[Middleware] = [_answer_errors]
    if token is not None:
        middlewares.append(_require(token))
    app = web.Application(middlewares=middlewares, client_max_size=_MAX_JSON)
    app[_MANAGER] = Manager(
        backend, pool=pool, pool_idle_s=pool_idle_s, disk_mb=disk_mb, egress=egress
    )
    app.cleanup_ctx.append(_backend_lifetime)
    # Before aiohttp waits for running requests: a closed sandbox answers its commands.
    app.on_shutdown.append(_close_all)
    box = "/sandboxes/{id}"
    app.add_routes(
        [
            web.get("/health", _health),
            web.get("/metrics", _metrics),
            web.get("/usage", _usage),
            web.put(box, _create),
            web.get("/sandboxes", _list),
            web.get(box, _show),
            web.delete(box, _close),
            web.post(f"{box}/exec", _exec),
            web.delete(f"{box}/operations/{{operation}}", _cancel),
            web.put(f"{box}/sessions/{{name}}", _open_session),
            web.post(f"{box}/sessions/{{name}}", _run),
            web.delete(f"{box}/sessions/{{name}}", _close_session),
            web.put(f"{box}/gates", _arm),
            web.post(f"{box}/reading/{{part}}", _take),
            web.post(f"{box}/end", _end),
            web.get(f"{box}/log", _log),
            web.post(f"{box}/pause", _pause),
            web.post(f"{box}/resume", _resume),
            web.post(f"{box}/snapshots", _snapshot),
            web.get("/snapshots", _snapshots),
            web.delete("/snapshots/{digest}", _delete_snapshot),
            web.get(f"{box}/files", _read),
            web.put(f"{box}/files", _write),
            web.get(f"{box}/archive", _download),
            web.put(f"{box}/archive", _upload),
        ]
    )
    return app


async def _close_all(app: web.Application) -> None:
    await app[_MANAGER].close_all()


async def _backend_lifetime(app: web.Application) -> AsyncIterator[None]:
    manager = app[_MANAGER]
    await manager.start()
    yield
    # Again, for those whose creation was under way.
    await manager.stop()


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns errors into `{"error": sentence, "kind": kind}` with their status."""
    try:
        try:
            return await handler(request)
        except ConnectionError:
            raise  # The caller is gone; there is nobody to answer.
        except (OSError, RuntimeError) as error:
            log.exception("%s %s", request.method, request.path)
            raise host_fault(error) from error
    except SandboxError as error:
        request.app[_MANAGER].metrics.rejections.labels(error.kind).inc()
        return web.json_response(_told(error), status=error.status)
    except web.HTTPRequestEntityTooLarge:
        sentence = f"the request is over the limit of {_MAX_JSON} bytes; write a file instead."
        return web.json_response(_told(SandboxTooLarge(sentence)), status=SandboxTooLarge.status)
    except web.HTTPException as error:
        sentence = f"{request.method} {request.path}: {error.reason}."
        return web.json_response(_told(SandboxRefused(sentence)), status=error.status)


def _told(error: SandboxError) -> dict[str, Any]:
    sentence = " ".join(str(error).splitlines())  # It may name what was asked for.
    told = {"error": sentence, "kind": error.kind, "infra": error.infra}
    return {**told, "facts": error.facts}


def _require(token: str) -> Middleware:
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode()
        if request.path != "/health" and not hmac.compare_digest(given, expected):
            raise SandboxUnauthorised(
                "the bearer token is missing or wrong; give the one that the service asks for."
            )
        return await handler(request)

    return check


def _workspace(
    request: web.Request, kind: str, path: str = "", *, writes: bool = False
) -> AbstractContextManager[Files]:
    manager = request.app[_MANAGER]
    return manager.workspace(request.match_info["id"], kind, path, writes=writes)


def _path(request: web.Request) -> str:
    try:
        return request.query["path"]
    except KeyError:
        raise SandboxRefused("path: name the file in the query, as in ?path=a/b.txt.") from None


async def _health(request: web.Request) -> web.Response:
    manager = request.app[_MANAGER]
    backend = manager.backend
    return web.json_response(
        {
            "status": "ok",
            "backend": backend.name,
            "isolation": backend.isolation,
            "sandboxes": len(manager.list()),
            "waiting": len(manager.pool.waiting),
            "egress": manager.egress.health(),
            **backend.health(),
        }
    )


async def _metrics(request: web.Request) -> web.Response:
    text = request.app[_MANAGER].metrics.text()
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _usage(request: web.Request) -> web.Response:
    return web.json_response({"usage": request.app[_MANAGER].usage()})


async def _log(request: web.Request) -> web.Response:
    after = request.query.get("after", "0")
    if not after.isdecimal():
        raise SandboxRefused(f"after: {after!r} is not the number of an event.")
    events = request.app[_MANAGER].events(
        request.match_info["id"], after=int(after), limit=_MAX_EVENTS
    )
    return web.json_response({"events": [to_json(event) for event in events]})


async def _create(request: web.Request) -> web.Response:
    spec = parse(SandboxSpec, await request.read() or b"{}")
    info = await request.app[_MANAGER].create(request.match_info["id"], spec)
    return web.json_response(to_json(info), status=201)


async def _list(request: web.Request) -> web.Response:
    return web.json_response(
        {"sandboxes": [to_json(info) for info in request.app[_MANAGER].list()]}
    )


async def _show(request: web.Request) -> web.Response:
    return web.json_response(to_json(request.app[_MANAGER].info(request.match_info["id"])))


async def _close(request: web.Request) -> web.Response:
    await request.app[_MANAGER].close(request.match_info["id"])
    return web.json_response({})


async def _exec(request: web.Request) -> web.StreamResponse:
    command = parse(ExecRequest, await request.read())
    work = functools.partial(request.app[_MANAGER].exec, request.match_info["id"], command)
    return await _result(request, work)


async def _result(
    request: web.Request, work: Callable[[OnOutput | None], Awaitable[ExecResult]]
) -> web.StreamResponse:
    """Answers with a command's result; with `?stream=1` by lines, the output as it comes first.

    Each line is an object: `{"stream": "stdout", "text": ...}` any number of times, then
    `{"result": ...}` or an error as in other answers.
    """
    if request.query.get("stream") != "1":
        return web.json_response(to_json(await work(None)))
    lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    decoders = {
        name: codecs.getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")
    }

    def on_output(name: str, data: bytes) -> None:
        lines.put_nowait({"stream": name, "text": decoders[name].decode(data)})

    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    task = asyncio.ensure_future(work(on_output))
    task.add_done_callback(lambda _: lines.put_nowait(None))
    try:
        await response.prepare(request)
        while (line := await lines.get()) is not None:
            await response.write(json.dumps(line).encode() + b"\n")
        try:
            line = {"result": to_json(task.result())}
        except SandboxError as error:
            line = _told(error)
        await response.write(json.dumps(line).encode() + b"\n")
        await response.write_eof()
    finally:
        # The caller went away, and its command with it.
        task.cancel()
        await asyncio.wait([task])
    return response


async def _cancel(request: web.Request) -> web.Response:
    match = request.match_info
    await request.app[_MANAGER].cancel(match["id"], match["operation"])
    return web.json_response({})


async def _open_session(request: web.Request) -> web.Response:
    match = request.match_info
    asked = parse(SessionRequest, await request.read() or b"{}")
    await request.app[_MANAGER].open_session(match["id"], match["name"], asked)
    return web.json_response({}, status=201)


async def _run(request: web.Request) -> web.StreamResponse:
    match = request.match_info
    command = parse(RunRequest, await request.read())
    work = functools.partial(request.app[_MANAGER].run, match["id"], match["name"], command)
    return await _result(request, work)


async def _close_session(request: web.Request) -> web.Response:
    match = request.match_info
    await request.app[_MANAGER].close_session(match["id"], match["name"])
    return web.json_response({})


async def _pause(request: web.Request) -> web.Response:
    return web.json_response(to_json(await request.app[_MANAGER].pause(request.match_info["id"])))


async def _resume(request: web.Request) -> web.Response:
    return web.json_response(to_json(await request.app[_MANAGER].resume(request.match_info["id"])))


async def _snapshot(request: web.Request) -> web.Response:
    info = await request.app[_MANAGER].snapshot(request.match_info["id"])
    return web.json_response(to_json(info), status=201)


async def _snapshots(request: web.Request) -> web.Response:
    found = await asyncio.to_thread(request.app[_MANAGER].checkpoints.stored.list)
    return web.json_response({"snapshots": [to_json(info) for info in found]})


async def _delete_snapshot(request: web.Request) -> web.Response:
    stored, digest = request.app[_MANAGER].checkpoints.stored, request.match_info["digest"]
    await asyncio.to_thread(stored.delete, digest)
    return web.json_response({})


async def _arm(request: web.Request) -> web.Response:
    gates = parse(Gates, await request.read())
    request.app[_MANAGER].arm(request.match_info["id"], gates)
    return web.json_response({}, status=201)


async def _take(request: web.Request) -> web.Response:
    part = request.match_info["part"]
    if not (part.isdecimal() and part.isascii()):
        raise SandboxRefused(f"part {part!r} is no number.")
    text = request.app[_MANAGER].take(request.match_info["id"], int(part))
    return web.json_response({"text": text})


async def _end(request: web.Request) -> web.Response:
    asked = parse(EndRequest, await request.read() or b"{}")
    check = await request.app[_MANAGER].end(request.match_info["id"], asked)
    return web.json_response({"check": None if check is None else to_json(check)})


async def _read(request: web.Request) -> web.Response:
    path = _path(request)
    with _workspace(request, "read", path) as workspace:
        data = await asyncio.to_thread(workspace.read, path)
    return web.Response(body=data, content_type="application/octet-stream")


async def _write(request: web.Request) -> web.Response:
    path = _path(request)
    with (
        _workspace(request, "write", path, writes=True) as workspace,
        await _body(request, workspace.max_bytes) as body,
    ):
        await _to_its_end(workspace.write, path, body)
    return web.json_response({})


async def _upload(request: web.Request) -> web.Response:
    with (
        _workspace(request, "upload", writes=True) as workspace,
        await _body(request, workspace.max_bytes) as body,
    ):
        await _to_its_end(workspace.unpack, body)
    return web.json_response({})


async def _download(request: web.Request) -> web.StreamResponse:
    # Packed whole before the first byte goes out, so that an error still has a status.
    with tempfile.TemporaryFile() as file:
        with _workspace(request, "download") as workspace:
            await asyncio.to_thread(workspace.pack, file)
        response = web.StreamResponse(headers={"Content-Type": "application/x-tar"})
        response.content_length = file.tell()
        await response.prepare(request)
        file.seek(0)
        while chunk := file.read(_CHUNK):
            await response.write(chunk)
        await response.write_eof()
        return response


async def _to_its_end(write: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Writes in a thread; if the caller goes away, it is still writing until this ends."""
    writing = asyncio.ensure_future(asyncio.to_thread(write, *args, **kwargs))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing])
        raise


async def _body(request: web.Request, limit: int) -> BinaryIO:
    """The request's body as a file: in memory when small, on disk when large."""
    small = (request.content_length or _CHUNK + 1) <= _CHUNK
    # The caller closes it.
    body: BinaryIO = BytesIO() if small else tempfile.TemporaryFile()  # noqa: SIM115
    try:
        async for chunk in request.content.iter_chunked(_CHUNK):
            if body.tell() + len(chunk) > limit:
                raise SandboxTooLarge(f"the upload is over the limit of {limit} bytes.")
            body.write(chunk)
    except BaseException:
        body.close()
        raise
    body.seek(0)
    return body
