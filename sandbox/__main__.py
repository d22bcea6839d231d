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
from sandbox.egress.settings import EgressSettings
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
        elif options.action == "install-egress":
            admin.install_egress()
        elif options.action == "doctor":
            admin.doctor(options.image, _cluster(options))
        elif options.action == "image":
            return _image(options)
        else:
            return asyncio.run(_ask(options, token)) or 0
    except SandboxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return seconds


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
        "--pool", type=_count, default=0, help="sandboxes kept ready, of the kinds asked for last"
    )
    run.add_argument(
        "--pool-idle", type=_seconds, default=600.0, metavar="S", help="seconds one is kept ready"
    )
    run.add_argument(
        "--egress", type=Path, metavar="FILE", help="JSON: how sandboxes reach the network"
    )
    run.add_argument(
        "--disk-mb",
        type=int,
        metavar="MB",
        help="disk quota of sandboxes that ask for none (10000 where it can be had); 0: no quota",
    )
    actions.add_parser("install-egress", help="install what lets sandboxes reach the network")
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
    execute.add_argument("--timeout", type=_seconds, default=60.0, metavar="S")
    logs = actions.add_parser("logs", parents=[service], help="what was done to a sandbox")
    logs.add_argument("id")
    remove = actions.add_parser("rm", parents=[service], help="remove sandboxes")
    remove.add_argument("ids", nargs="+", metavar="id")
    _add_image(actions.add_parser("image", help="build, list, prune and check images"))
    keep = actions.add_parser("snapshot", parents=[service], help="keep files and sessions")
    keep.add_argument("id")
    for name, what in (("pause", "stop all in sandboxes"), ("resume", "let it run on")):
        hold = actions.add_parser(name, parents=[service], help=what)
        hold.add_argument("ids", nargs="+", metavar="id")
    actions.add_parser("snapshots", parents=[service], help="the snapshots that are kept")
    drop = actions.add_parser("drop", parents=[service], help="delete snapshots")
    drop.add_argument("digests", nargs="+", metavar="digest")
    return parser


def _cluster(options: argparse.Namespace) -> Options:
    return Options(
        namespace=options.namespace,
        runtime_class=options.runtime_class,
        kubeconfig=options.kubeconfig,
    )


def _add_image(image: argparse.ArgumentParser) -> None:
    actions = image.add_subparsers(dest="image_action", required=True)
    build = actions.add_parser("build", help="build an image; prints its name")
    build.add_argument("kind", nargs="?", help="slim, research or layer")
    build.add_argument("--task", type=Path, help="make a layer of this task's needs")
    build.add_argument("--requirements", type=Path, help="make a layer of this list for pip")
    build.add_argument("--base", help="build on this image")
    build.add_argument("--source", choices=("auto", "registry", "debootstrap"), default="auto")
    build.add_argument("--without", default="", metavar="A,B", help="of the research list")
    build.add_argument("--force", action="store_true", help="build also what is there")
    actions.add_parser("list", help="the images of sandboxes on this host")
    actions.add_parser("prune", help="remove those that are old and that no container uses")
    check = actions.add_parser("check", help="try all of an image in a hardened sandbox")
    check.add_argument("name")


def _image(options: argparse.Namespace) -> int:
    # Imported here, for a host without the Docker SDK can run the local backend.
    from sandbox.images import command

    if options.image_action == "check":
        return command.run(("check", options.name), command.Recipe())
    if options.image_action != "build":
        return command.run((options.image_action,), command.Recipe())
    asked = command.Recipe(
        task=options.task,
        requirements=options.requirements,
        base=options.base,
        source=options.source,
        without=tuple(filter(None, options.without.split(","))),
        force=options.force,
    )
    return command.run(("build", *filter(None, [options.kind])), asked)


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
        egress=None if options.egress is None else EgressSettings.read(options.egress),
        disk_mb=options.disk_mb,
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
        elif options.action == "snapshot":
            await admin.snapshot(client, options.id)
        elif options.action == "pause":
            await admin.pause(client, options.ids)
        elif options.action == "resume":
            await admin.resume(client, options.ids)
        elif options.action == "snapshots":
            await admin.snapshots(client)
        elif options.action == "drop":
            await admin.drop(client, options.digests)
        else:
            await admin.remove(client, options.ids)
    return None


if __name__ == "__main__":
    sys.exit(main())
