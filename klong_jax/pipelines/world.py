"""What attempts need around them, whoever makes them: a sandbox service and a clock."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext

from klong_jax.core.clock import Clock, VirtualClock, WallClock
from klong_jax.pipelines.config.acting import ClockSection, SandboxSection
from sandbox.client import Limits, SandboxClient, SandboxSpec
from sandbox.service import embedded


def clock_factory(section: ClockSection) -> Callable[[], Clock]:
    """Makes clocks of the kind the settings name."""
    if section.kind == "virtual":
        return lambda: VirtualClock(section.token_s, section.tool_s)
    return WallClock


def sandbox_spec(section: SandboxSection) -> SandboxSpec:
    """The sandbox every rollout gets."""
    limits = Limits(cpus=section.cpus, memory_mb=section.memory_mb, pids=section.pids)
    return SandboxSpec(limits=limits)


@asynccontextmanager
async def open_sandboxes(section: SandboxSection) -> AsyncIterator[SandboxClient]:
    """A client of the service the settings name, which is started here if they name none."""
    token = os.environ.get(section.token_env) if section.token_env else None
    service = (
        nullcontext(section.url)
        if section.url
        else embedded(section.backend, isolation=section.isolation)
    )
    async with AsyncExitStack() as stack:
        url = stack.enter_context(service)
        client = SandboxClient(url, token)
        stack.push_async_callback(client.close)
        yield client
