"""The one way out of a sandbox: a policy, the proxy that holds it, and the proxy's life.

    command --> relay in the sandbox --> socket of the sandbox --> engine (mitmproxy) --> a host

`urls`, `blocks`, `packages`, `policy` judge, and are of the standard library alone, as `lookup` is,
for the engine is a process with a Python environment of its own: `engine`, `connection`, `gate`,
`audit`. `proxy` and `settings` are the service's side; `install` makes the environment.
"""

from __future__ import annotations

from pathlib import Path


def engine_path() -> Path:
    """The engine's program."""
    return Path(__file__).with_name("engine.py")
