"""`klong bench what=sandbox`: the sandbox service beside what else runs commands in containers.

Everything is timed as its user has it: ours through its HTTP client, on bubblewrap and Docker;
the Docker SDK by `exec_run`; SWE-ReX by its Docker deployment. The limit is what the bare host
takes for the same without any isolation.
"""

import asyncio
import importlib.util
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from klong_jax.core.errors import UserError
from klong_jax.pipelines.bench_sandbox.peers import BareHost, DockerSdk, SweRex
from sandbox.client import Sandbox, SandboxClient, Session
from sandbox.doctor import findings
from sandbox.service import embedded

_DATA = b"0123456789" * 100_000
_IMAGE = "klong/base:bookworm"

MEASURES = {
    "create": "create to first command, ms",
    "claim": "warm claim to first command, ms",
    "session": "command in a session, ms",
    "exec": "exec, ms",
    "write": "write 1 MB, ms",
    "read": "read 1 MB, ms",
    "rate": "commands a second, over {} sandboxes",
    "memory": "host memory a sandbox, MB",
}
TARGETS = {"claim": 10.0, "session": 2.0, "exec": 4.0, "rate": 500.0, "memory": 16.0}
"""What the service is meant to reach; the other measures have none."""


class Machine(Protocol):
    """One sandbox of a contender; of its operations it may lack some (`NotImplementedError`)."""

    async def exec(self) -> None:
        """Runs `true` by itself."""

    async def run(self) -> None:
        """Runs `true` in a session that is open; the first call opens it."""

    async def write(self, data: bytes) -> None:
        """Writes a file."""

    async def read(self) -> bytes:
        """Reads that file."""

    async def memory(self) -> int:
        """Bytes of the host's memory that its processes take, and the one that minds them."""

    async def close(self) -> None:
        """Removes the sandbox."""


class Contender(Protocol):
    """A way to have sandboxes."""

    name: str

    async def create(self) -> Machine:
        """Makes one, as fast as may be."""


class Ours:
    """A service of this package."""

    def __init__(self, name: str, client: SandboxClient) -> None:
        """Wraps its client."""
        self.name, self._client = name, client

    async def create(self) -> "_OurMachine":
        """Makes a sandbox with the default limits."""
        return _OurMachine(self._client, await self._client.create())


class _OurMachine:
    def __init__(self, client: SandboxClient, box: Sandbox) -> None:
        self._client, self._box = client, box
        self._session: Session | None = None

    async def exec(self) -> None:
        await self._box.exec("true")

    async def run(self) -> None:
        if self._session is None:
            self._session = await self._box.session()
        await self._session.run("true")

    async def write(self, data: bytes) -> None:
        await self._box.write("data", data)

    async def read(self) -> bytes:
        return await self._box.read("data")

    async def memory(self) -> int:
        used = await self._client.usage()
        return int(used[self._box.id]["memory_bytes"])

    async def close(self) -> None:
        await self._box.close()


@asynccontextmanager
async def service(backend: str, pool: int) -> AsyncIterator[SandboxClient]:
    """A service of its own, on "bubblewrap" or "docker"."""
    with tempfile.TemporaryDirectory(prefix="klong-bench-", dir="/tmp") as folder:
        Path(folder).chmod(0o711)
        service = embedded(
            "docker" if backend == "docker" else "local",
            isolation="bubblewrap",
            state_dir=Path(folder),
            pool=pool,
        )
        with service as url:
            async with SandboxClient(url) as client:
                yield client


def run(repeats: int) -> None:
    """Prints a row a measure, once all are done."""
    there = {one.name for one in findings(_IMAGE) if one.found}
    ours = [name for name, needs in _NEEDS.items() if needs <= there]
    if not ours:
        raise UserError("what=sandbox: neither bubblewrap nor Docker works here; see klong doctor")
    asyncio.run(_run(ours, repeats))


async def _run(ours: Sequence[str], repeats: int) -> None:
    columns: dict[str, dict[str, float]] = {"limit": await measure(BareHost(), repeats)}
    for name in ours:
        async with service(name, pool=0) as client:
            columns[name] = await measure(Ours(name, client), repeats)
        async with service(name, pool=1) as client:
            columns[name]["claim"] = await measure_claim(client, repeats)
    if "docker" in ours:
        columns["Docker SDK"] = await measure(DockerSdk(_IMAGE), repeats)
        if importlib.util.find_spec("swerex"):
            columns["SWE-ReX"] = await measure(SweRex(_IMAGE), repeats)
        else:
            print("SWE-ReX is not installed: pip install 'klong-jax[bench]'")
    for row in table(columns):
        print(row)


_NEEDS = {"bubblewrap": {"bubblewrap"}, "docker": {"docker daemon", "sandbox image"}}


async def measure(
    contender: Contender, repeats: int, *, count: int = 32, seconds: float = 3.0
) -> dict[str, float]:
    """Every measure of a contender but claims; those it lacks are left out.

    Args:
        contender: What is measured.
        repeats: Creations, and tenths of calls, whose median counts.
        count: Sandboxes for the rate and the memory.
        seconds: How long the rate is taken.
    """
    found: dict[str, float] = {}
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        machine = await contender.create()
        await machine.exec()
        times.append(time.perf_counter() - start)
        await machine.close()
    found["create"] = median(times) * 1e3
    async with AsyncExitStack() as stack:
        machine = await contender.create()
        stack.push_async_callback(machine.close)
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "exec": machine.exec,
            "session": machine.run,
            "write": lambda: machine.write(_DATA),
            "read": machine.read,
        }
        for name, call in calls.items():
            try:
                found[name] = await _median_ms(call, 10 * repeats)
            except NotImplementedError:
                continue
    machines: list[Machine] = []
    async with AsyncExitStack() as stack:
        for _ in range(count):
            machines.append(await contender.create())
            stack.push_async_callback(machines[-1].close)
        found["rate"] = await _rate(machines, seconds)
        with suppress(NotImplementedError):
            found["memory"] = sum([await machine.memory() for machine in machines]) / count / 1e6
    return found


async def measure_claim(client: SandboxClient, repeats: int) -> float:
    """Milliseconds from asking for a sandbox that waits in the pool to its first command's end."""
    await (await client.create()).close()
    times = []
    for _ in range(repeats):
        while (await client.health())["waiting"] == 0:
            await asyncio.sleep(0.02)
        start = time.perf_counter()
        box = await client.create()
        await box.exec("true")
        times.append(time.perf_counter() - start)
        await box.close()
    return median(times) * 1e3


async def _median_ms(call: Callable[[], Awaitable[Any]], repeats: int) -> float:
    await call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        await call()
        times.append(time.perf_counter() - start)
    return median(times) * 1e3


async def _rate(machines: list[Machine], seconds: float) -> float:
    """Commands a second that the machines run together: in sessions, where they have them."""

    async def first(machine: Machine) -> Callable[[], Awaitable[None]]:
        try:
            await machine.run()
        except NotImplementedError:
            return machine.exec
        return machine.run

    calls = [await first(machine) for machine in machines]
    end = time.perf_counter() + seconds

    async def work(call: Callable[[], Awaitable[None]]) -> int:
        done = 0
        while time.perf_counter() < end:
            await call()
            done += 1
        return done

    start = time.perf_counter()
    done = sum(await asyncio.gather(*map(work, calls)))
    return done / (time.perf_counter() - start)


def table(columns: dict[str, dict[str, float]], count: int = 32) -> list[str]:
    """A row a measure: the target, each column, and how much better ours on Docker is than peers.

    A ratio over 1 says that ours is better.
    """
    ours = "docker" if "docker" in columns else "bubblewrap"
    peers = [name for name in columns if name in ("Docker SDK", "SWE-ReX")]
    heads = ["", "target", *columns, *(f"{ours} / {peer}" for peer in peers)]
    rows = [heads]
    for measure_, said in MEASURES.items():
        cells = [_number(column.get(measure_)) for column in columns.values()]
        for peer in peers:
            own, other = columns[ours].get(measure_), columns[peer].get(measure_)
            if own is None or other is None:
                cells.append("-")
            else:
                cells.append(f"{own / other if measure_ == 'rate' else other / own:.1f} x")
        rows.append([said.format(count), _number(TARGETS.get(measure_)), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
