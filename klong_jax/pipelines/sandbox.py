"""`klong sandbox`: serves sandboxes until it is interrupted, or asks a service about them."""

import asyncio
import os
from collections.abc import Awaitable, Callable

from klong_jax.core.errors import UserError
from klong_jax.pipelines.config.commands import SandboxConfig
from sandbox import admin
from sandbox.backends.kubernetes.options import Options
from sandbox.client import SandboxClient, SandboxError
from sandbox.egress.settings import EgressSettings
from sandbox.service import serve

_USAGE = {
    "serve": "klong sandbox serve",
    "ps": "klong sandbox ps",
    "exec": "klong sandbox exec ID 'COMMAND'",
    "logs": "klong sandbox logs ID",
    "rm": "klong sandbox rm ID ...",
    "doctor": "klong sandbox doctor",
    "install-egress": "klong sandbox install-egress",
    "image": "klong sandbox image build [slim | research | layer], image list, image prune or "
    "image check NAME",
    "pause": "klong sandbox pause ID ...",
    "resume": "klong sandbox resume ID ...",
    "snapshot": "klong sandbox snapshot ID",
    "snapshots": "klong sandbox snapshots",
    "drop": "klong sandbox drop DIGEST ...",
}


def run(settings: SandboxConfig, *words: str) -> int:
    """Does what the first word says, to what the others name; without words it serves.

    Returns:
        The exit status: of `exec`, the command's.
    """
    action, *names = words or ("serve",)
    if action not in _USAGE:
        raise UserError(f"there is no klong sandbox {action}; choose one of {', '.join(_USAGE)}")
    expected = {"exec": len(names) == 2, "logs": len(names) == 1, "snapshot": len(names) == 1}
    expected |= dict.fromkeys(("rm", "pause", "resume", "drop", "image"), len(names) >= 1)
    if not expected.get(action, not names):
        raise UserError(f"write {_USAGE[action]}")
    token = None
    if settings.token_env is not None:
        token = os.environ.get(settings.token_env)
        if not token:
            raise UserError(f"token_env: the variable {settings.token_env} is not set; set it.")
    try:
        if action == "serve":
            _serve(settings, token)
        elif action == "doctor":
            admin.doctor(settings.image, _cluster(settings))
        elif action == "install-egress":
            admin.install_egress()
        elif action == "image":
            return _image(settings, names)
        else:
            return asyncio.run(_ask(settings, token, action, names)) or 0
    except SandboxError as error:
        raise UserError(str(error)) from None
    return 0


def _cluster(settings: SandboxConfig) -> Options:
    return Options(
        namespace=settings.namespace,
        runtime_class=settings.runtime_class,
        kubeconfig=settings.kubeconfig,
    )


def _serve(settings: SandboxConfig, token: str | None) -> None:
    if settings.url is not None:
        raise UserError("url: a service is told its host and port; leave url out.")
    serve(
        backend=settings.backend,
        isolation=settings.isolation,
        host=settings.host,
        port=settings.port,
        token=token,
        state_dir=settings.state_dir,
        pool=settings.pool,
        pool_idle_s=settings.pool_idle_s,
        egress=None if settings.egress is None else EgressSettings.read(settings.egress),
        disk_mb=settings.disk_mb,
        cluster=_cluster(settings),
        announce=lambda sentence: print(sentence, flush=True),
    )


def _image(settings: SandboxConfig, words: list[str]) -> int:
    # Imported here, for a host without the Docker SDK can run the local backend.
    from sandbox.images import command

    asked = command.Recipe(
        task=settings.task,
        requirements=settings.requirements,
        base=settings.base,
        source=settings.source,
        without=tuple(settings.without),
        force=settings.force,
    )
    return command.run(words, asked)


async def _ask(
    settings: SandboxConfig, token: str | None, action: str, names: list[str]
) -> int | None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    async with SandboxClient(settings.url or f"http://{host}:{settings.port}", token) as client:
        answers: dict[str, Callable[[], Awaitable[int | None]]] = {
            "ps": lambda: admin.ps(client),
            "exec": lambda: admin.execute(client, *names, timeout_s=settings.timeout_s),
            "logs": lambda: admin.logs(client, *names),
            "rm": lambda: admin.remove(client, names),
            "pause": lambda: admin.pause(client, names),
            "resume": lambda: admin.resume(client, names),
            "snapshot": lambda: admin.snapshot(client, *names),
            "snapshots": lambda: admin.snapshots(client),
            "drop": lambda: admin.drop(client, names),
        }
        return await answers[action]()
