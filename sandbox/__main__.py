"""`python -m sandbox serve`: runs the service in the foreground."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from sandbox.errors import SandboxError
from sandbox.service import serve


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and serves; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sandbox", description="The sandbox service.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("serve", help="serve until SIGINT or SIGTERM")
    run.add_argument("--backend", choices=("local", "docker"), default="local")
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
    run.add_argument(
        "--token-env",
        metavar="NAME",
        help="environment variable with the bearer token to ask for",
    )
    options = parser.parse_args(argv)
    token = None
    if options.token_env is not None:
        token = os.environ.get(options.token_env)
        if not token:
            parser.error(f"--token-env: the variable {options.token_env} is not set")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        serve(
            backend=options.backend,
            isolation=options.isolation,
            host=options.host,
            port=options.port,
            token=token,
            state_dir=options.state_dir,
            pool=options.pool,
            pool_idle_s=options.pool_idle,
            announce=lambda sentence: print(sentence, flush=True),
        )
    except SandboxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
