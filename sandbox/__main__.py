"""`python -m sandbox`: runs the service in the foreground, or asks one about its sandboxes."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from sandbox import admin
from sandbox.backends.kubernetes.options import Options
from sandbox.client import SandboxClient
from sandbox.errors import SandboxError
from sandbox.service import serve


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and does what it says; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    token = None
    if getattr(options, "token_env", None) is not None:
        token = os.environ.get(options.token_env)
        if not token:
            parser.error(f"--token-env: the variable {options.token_env} is not set")
    try:
        if options.action == "serve":
            _serve(options, token)
        elif options.action == "doctor":
            admin.doctor(options.image, _cluster(options))
        else:
            return asyncio.run(_ask(options, token)) or 0
    except SandboxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sandbox", description="The sandbox service.")
    actions = parser.add_subparsers(dest="action", required=True)
    token = argparse.ArgumentParser(add_help=False)
    token.add_argument(
        "--token-env", metavar="NAME", help="environment variable with the bearer token to ask for"
    )
    cluster = argparse.ArgumentParser(add_help=False)
    cluster.add_argument("--namespace", default="klong-sandbox", help="of kubernetes: its pods'")
    cluster.add_argument("--runtime-class", help="of kubernetes: such as gVisor's or Kata's")
    cluster.add_argument("--kubeconfig", help="of kubernetes: how to reach the cluster")
    run = actions.add_parser(
        "serve", parents=[token, cluster], help="serve until SIGINT or SIGTERM"
    )
    run.add_argument("--backend", choices=("local", "docker", "kubernetes"), default="local")
    run.add_argument("--isolation", choices=("auto", "bubblewrap", "none"), default="auto")
    run.add_argument("--host", default="127.0.0.1")
    run.add_argument("--port", type=int, default=8700, help="0 takes a free port")
    run.add_argument("--state-dir", type=Path, help="where workspaces live")
    run.add_argument(
        "--pool", type=int, default=0, help="sandboxes kept ready, of the kinds asked for last"
    )
    run.add_argument(
        "--pool-idle", type=float, default=600.0, metavar="S", help="seconds one is kept ready"
    )
    host = actions.add_parser(
        "doctor", parents=[cluster], help="what this host can do for sandboxes"
    )
    host.add_argument("--image", default="klong/base:bookworm", help="what docker takes by default")

    service = argparse.ArgumentParser(add_help=False, parents=[token])
    service.add_argument("--url", default="http://127.0.0.1:8700", help="the service to ask")
    actions.add_parser("ps", parents=[service], help="the living sandboxes")
    execute = actions.add_parser("exec", parents=[service], help="run a command in a sandbox")
    execute.add_argument("id")
    execute.add_argument("command", help="shell text, one word")
    execute.add_argument("--timeout", type=float, default=60.0, metavar="S")
    logs = actions.add_parser("logs", parents=[service], help="what was done to a sandbox")
    logs.add_argument("id")
    remove = actions.add_parser("rm", parents=[service], help="remove sandboxes")
    remove.add_argument("ids", nargs="+", metavar="id")
    return parser


def _cluster(options: argparse.Namespace) -> Options:
    return Options(
        namespace=options.namespace,
        runtime_class=options.runtime_class,
        kubeconfig=options.kubeconfig,
    )


def _serve(options: argparse.Namespace, token: str | None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    serve(
        backend=options.backend,
        isolation=options.isolation,
        host=options.host,
        port=options.port,
        token=token,
        state_dir=options.state_dir,
        pool=options.pool,
        pool_idle_s=options.pool_idle,
        cluster=_cluster(options),
        announce=lambda sentence: print(sentence, flush=True),
    )


async def _ask(options: argparse.Namespace, token: str | None) -> int | None:
    async with SandboxClient(options.url, token) as client:
        if options.action == "ps":
            await admin.ps(client)
        elif options.action == "exec":
            timeout_s = options.timeout
            return await admin.execute(client, options.id, options.command, timeout_s=timeout_s)
        elif options.action == "logs":
            await admin.logs(client, options.id)
        else:
            await admin.remove(client, options.ids)
    return None


if __name__ == "__main__":
    sys.exit(main())
