"""What runs in the sandbox at a moment, for a snapshot: its sessions, as far as they can tell."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from sandbox.agent import processes
from sandbox.agent.jobs import Pool
from sandbox.agent.sessions import Session
from sandbox.protocol import Header

# What a shell has to tell its environment; one that does not is taken as busy.
_PATIENCE_S = 2.0

# What each shell sets for itself.
_OWN = frozenset(("_", "OLDPWD", "PWD", "SHLVL"))


def look(
    pool: Pool,
    sessions: Mapping[str, Session],
    known: Mapping[str, str],
    *,
    limit: int,
    on_look: Callable[[list[Header], int], None],
) -> None:
    """Asks all shells that run no command at once.

    Args:
        pool: The sandbox's supervisors.
        sessions: By name.
        known: The environment that a session begins with.
        limit: Bytes of all environments; the last ones are left out beyond that.
        on_look: Hears of each session that lives, and how many processes there are beside.
    """
    living = {name: session for name, session in sessions.items() if not session.over}
    told: dict[str, Mapping[str, str]] = {}
    asked = {name for name, session in living.items() if not (session.busy or session.is_asked)}
    over = False

    def end() -> None:
        nonlocal over
        if over:
            return
        over = True
        late.cancel()
        table = processes.table()
        shells, left = [], limit
        own = set(pool.alive)
        for name, session in living.items():
            process = session.shell
            own |= {process} if process is not None else set()
            env = told.get(name, session.env)
            shell = _shell(name, process, env, known, whole=name in told)
            left -= len(json.dumps(shell))
            if left < 0:
                shell.update(env={}, unset=[], whole=False)
            shells.append(shell)
        on_look(shells, len(processes.below([os.getpid()], table) - own))

    def hear(name: str, data: bytes) -> None:
        if data:
            texts = data.decode("utf-8", "surrogateescape").split("\0")[:-1]
            told[name] = dict(text.split("=", 1) for text in texts if "=" in text[1:])
        asked.discard(name)
        if not asked:
            end()

    late = pool.loop.later(_PATIENCE_S, end)
    if not asked:
        end()
    for name in list(asked):
        living[name].tell(partial(hear, name))


def _shell(
    name: str,
    process: int | None,
    env: Mapping[str, str],
    known: Mapping[str, str],
    *,
    whole: bool,
) -> Header:
    cwd = None
    with suppress(OSError):
        path = os.readlink(f"/proc/{process}/cwd")
        # The kernel says so by a word at the end, which may also be a name.
        if os.path.isdir(path):
            cwd = path
    return {
        "name": name,
        "cwd": cwd,
        "env": {n: v for n, v in env.items() if known.get(n) != v and n not in _OWN},
        "unset": [n for n in known if n not in env and n not in _OWN],
        "whole": whole,
    }
