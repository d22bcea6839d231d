"""Hostile acts that show from outside: what commands leave, files offered and taken, floods."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from sandbox_helpers import sleepers, unique_sleep, wait_until

from sandbox.client import Sandbox, SandboxError, SandboxRefused, SandboxTooLarge


class Scene(NamedTuple):
    """The attacked sandbox, another one, and a directory of the host's that others can write."""

    box: Sandbox
    peer: Sandbox
    outside: Path


class Attack(NamedTuple):
    """What is tried, what comes of it, and why."""

    what: str
    outcome: str
    mechanism: str
    program: Callable[[Scene], Awaitable[str]]


ATTACKS: list[Attack] = []

_Program = Callable[[Scene], Awaitable[str]]


def attack(what: str, outcome: str, mechanism: str) -> Callable[[_Program], _Program]:
    def add(program: _Program) -> _Program:
        ATTACKS.append(Attack(what, outcome, mechanism, program))
        return program

    return add


async def _all_dead(argument: str) -> str:
    dead = await asyncio.to_thread(wait_until, lambda: not sleepers(argument), timeout_s=5)
    return "all dead" if dead else f"{len(sleepers(argument))} live"


# Processes.


@attack("fork without end", "ended at its timeout", "limits.pids; all stopped, then killed")
async def _(scene: Scene) -> str:
    bomb = "bomb() { bomb | bomb & }; bomb; while :; do sleep 1; done 2>/dev/null"
    result = await scene.box.exec(bomb, timeout_s=0.7)
    return "ended at its timeout" if result.timed_out else f"status {result.exit_code}"


@attack(
    "leave daemons: sessions of their own, no environment, deaf to SIGTERM",
    "all dead",
    "a subreaper above each command",
)
async def _(scene: Scene) -> str:
    argument = unique_sleep()
    daemon = f"env -i setsid setsid -f sh -c 'trap \"\" TERM HUP; sleep {argument}; sleep 9'"
    running = asyncio.create_task(
        scene.box.exec(f"({daemon} & {daemon}) >/dev/null 2>&1; sleep {argument}")
    )
    seen = await asyncio.to_thread(wait_until, lambda: len(sleepers(argument)) >= 3)
    running.cancel()
    await asyncio.wait([running])
    return await _all_dead(argument) if seen else "did not start"


@attack("kill the supervisor and run on", "all dead", "the agent sweeps what has lost its own")
async def _(scene: Scene) -> str:
    argument = unique_sleep()
    await scene.box.exec(f"(setsid -f sleep {argument}) >/dev/null 2>&1; kill -9 $PPID; sleep 9")
    return await _all_dead(argument)


@attack("kill everybody", "only oneself", "process 1 hears no signal from inside")
async def _(scene: Scene) -> str:
    result = await scene.box.exec("kill -9 -1; sleep 5")
    return "only oneself" if result.exit_code == 137 else f"status {result.exit_code}"


@attack("leave zombies", "none", "supervisors reap what they inherit")
async def _(scene: Scene) -> str:
    leave = "import os,time\nfor n in range(20):\n if not os.fork():\n  os.fork(); os._exit(0)\n"
    await scene.box.exec("python3 -", stdin=leave + "time.sleep(0.1)")
    count = await scene.box.exec("cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z '")
    return "none" if count.stdout == "0\n" else count.stdout


@attack("take memory by many processes", "killed", "limits.memory_mb; commands go before the agent")
async def _(scene: Scene) -> str:
    eat = "import os,time\nfor n in range(5): os.fork()\nb = b'x' * 16_000_000"
    hold = f"{eat}; print('ate', flush=True); time.sleep(2)"
    result = await scene.box.exec("python3 -", stdin=hold, timeout_s=10)
    return "killed" if result.stdout.count("ate") < 32 else "took it"


@attack("print without end", "cut, counted", "head and tail kept; the rest counted")
async def _(scene: Scene) -> str:
    result = await scene.box.exec("yes", timeout_s=0.4)
    limit = scene.box.info.spec.limits.output_bytes
    kept = result.stdout_bytes > 100_000 and len(result.stdout) < limit + 100
    return "cut, counted" if kept else f"{len(result.stdout)} of {result.stdout_bytes} bytes"


@attack("open sessions without end", "refused", "at most 64, and limits.pids")
async def _(scene: Scene) -> str:
    opened = await asyncio.gather(*[scene.box.session() for _ in range(80)], return_exceptions=True)
    said = {type(one).__name__ for one in opened if isinstance(one, BaseException)}
    live = [one for one in opened if not isinstance(one, BaseException)]
    # Those that were given work.
    works = await asyncio.gather(*[one.run(":") for one in live])
    await asyncio.gather(*[one.close() for one in live])
    right = len(live) <= 64 and all(one.exit_code == 0 for one in works)
    return "refused" if right and said == {"SandboxRefused"} else f"{said}, {len(live)} open"


@attack("flood the agent with commands", "each answered", "one operation, one answer")
async def _(scene: Scene) -> str:
    results = await asyncio.gather(*[scene.box.exec(f"exit {n % 7}") for n in range(150)])
    # Out of processes, a command says so with status 126.
    right = all(one.exit_code in (n % 7, 126) for n, one in enumerate(results))
    return "each answered" if right else str({one.exit_code for one in results})


# Files, read and written from outside.


async def _refusals(*tries: Awaitable[object]) -> str:
    said = set()
    for one in tries:
        try:
            await one
            said.add("done")
        except SandboxRefused as error:
            said.add("too large" if isinstance(error, SandboxTooLarge) else "refused")
        except SandboxError as error:
            said.add(type(error).__name__)
    return ", ".join(sorted(said))


@attack("offer a link, a pipe or a directory as a file", "refused", "O_NOFOLLOW, a step a name")
async def _(scene: Scene) -> str:
    make = "mkdir -p l; cd l; ln -s /etc up; ln -s /etc/passwd f; mkfifo p; ln -s . d; mkdir e"
    assert (await scene.box.exec(make)).exit_code == 0
    paths = ("l/up/passwd", "l/f", "l/p", "l/d/f", "l/e", "../x", "/etc/passwd", "l/../../x")
    tries = [scene.box.read(path) for path in paths]
    return await _refusals(*tries, *[scene.box.write(path, "x") for path in paths])


@attack("swap a directory for a link under a writer", "nothing outside", "descriptors, not paths")
async def _(scene: Scene) -> str:
    swap = f"""
import ctypes, os, time
os.makedirs('swap', exist_ok=True)
os.symlink({str(scene.outside)!r}, 'link')
end = time.monotonic() + 0.7
while time.monotonic() < end:
    assert ctypes.CDLL(None).renameat2(-100, b'swap', -100, b'link', 2) == 0
"""
    running = asyncio.create_task(scene.box.exec("python3 -", stdin=swap))
    written = missed = 0
    while not running.done():
        try:
            await scene.box.write("swap/evil", "x")
            written += 1
        except SandboxError:
            missed += 1
    swapped = (await running).exit_code == 0 and written and missed
    assert swapped, f"no race: {written} written, {missed} refused, {(await running).stderr}"
    found = [path.name for path in scene.outside.iterdir() if path.name == "evil"]
    return "; ".join(found) or "nothing outside"


@attack(
    "offer a tree with links to the host's files", "links, no contents", "links are packed as such"
)
async def _(scene: Scene) -> str:
    secret = scene.outside / "secret"
    secret.write_text("the host's secret")
    await scene.box.exec(f"mkdir t; ln -s {secret} t/file; ln -s {scene.outside} t/directory")
    tree = await scene.box.download_tree()
    with tarfile.open(fileobj=io.BytesIO(tree)) as tar:
        kinds = {tar.getmember(f"t/{name}").type for name in ("file", "directory")}
    return "links, no contents" if kinds == {tarfile.SYMTYPE} and b"secret'" not in tree else "read"


@attack("offer a tree that is larger than it looks", "too large", "counted while it is packed")
async def _(scene: Scene) -> str:
    size = scene.box.info.spec.limits.files_mb * 600_000
    await scene.box.exec(f"mkdir s; for n in 1 2 3; do truncate -s {size} s/$n; done")
    return await _refusals(scene.box.download_tree())


def _tar(*members: tuple[str, bytes, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, link in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            tar.addfile(member)
    return out.getvalue()


@attack("take a tar with .., absolute names, links out, devices", "refused", "no link is followed")
async def _(scene: Scene) -> str:
    regular, symlink, hard = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
    outside = str(scene.outside)
    tars = [
        _tar(("../evil", regular, "")),
        _tar((f"{outside}/evil", regular, "")),
        _tar(("a", symlink, outside), ("a/evil", regular, "")),
        _tar(("b", symlink, ".."), ("b/evil", regular, "")),
        _tar(("c", symlink, outside), ("c", tarfile.DIRTYPE, "")),
        _tar(("d", hard, "/etc/passwd")),
        _tar(("e", tarfile.CHRTYPE, "")),
        _tar(("f", tarfile.FIFOTYPE, "")),
    ]
    said = await _refusals(*[scene.box.upload_tree(tar) for tar in tars])
    return said if not (scene.outside / "evil").exists() else "written outside"


# Peers.

_SHARE = """
import ctypes, os, socket, time
libc = ctypes.CDLL(None)
made = [libc.shmget(77, 4096, 0o1666) >= 0]
for place in ('/tmp', '/dev/shm', os.path.expanduser('~'), '/workspace'):
    open(place + '/shared', 'w').close()
server = socket.socket(socket.AF_UNIX); server.bind('\\0shared'); server.listen()
port = socket.create_server(('127.0.0.1', 4321))
print(made, flush=True)
"""

_LOOK = """
import ctypes, os, socket
libc = ctypes.CDLL(None)
if libc.shmget(77, 4096, 0o666) >= 0: print('shared memory')
for place in ('/tmp', '/dev/shm', os.path.expanduser('~'), '/workspace'):
    if os.path.exists(place + '/shared'): print(place)
for family, address in ((socket.AF_UNIX, '\\0shared'), (socket.AF_INET, ('127.0.0.1', 4321))):
    try: socket.socket(family).connect(address); print(address)
    except OSError: pass
"""


@attack(
    "find a peer's files, memory, sockets, ports", "nothing", "own namespaces, user, directories"
)
async def _(scene: Scene) -> str:
    # Seen by the peer itself, so what the other does not see is there.
    itself = await scene.peer.exec("python3 -", stdin=_SHARE + _LOOK)
    assert itself.stdout.count("\n") == 8, itself
    session = await scene.peer.session()
    await scene.peer.write("share.py", _SHARE + "time.sleep(30)")
    await session.run("python3 share.py >ready & while [ ! -s ready ]; do sleep 0.02; done")
    seen = await scene.box.exec("python3 -", stdin=_LOOK)
    await session.close()
    return seen.stdout.strip() or "nothing" if seen.exit_code == 0 else seen.stderr


@attack(
    "own files by a user of the host or of a peer", "its own user", "a user a sandbox, high ids"
)
async def _(scene: Scene) -> str:
    users = []
    for box in (scene.box, scene.peer):
        await box.exec("touch mine")
        (path,) = scene.outside.parent.glob(f"state/*/*/{box.id}/data/workspace/mine")
        users.append(os.stat(path).st_uid)
    return "its own user" if users[0] != users[1] and min(users) >= 1 << 30 else str(users)
