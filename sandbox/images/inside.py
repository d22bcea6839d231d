"""Runs inside a sandbox: imports every package of the image's lists, each in its own process.

Standard library only, for it is handed to the image's own Python. Prints one JSON object a line.
"""

from __future__ import annotations

import glob
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

LISTS = "/usr/share/klong"
_PIN = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?(?:==([^\s;#]+))?")
# For one import or one command; a command that is killed has status 124.
PATIENCE_S = 300
# What some packages install beside their own, by mistake.
_NOT_THEIRS = {"test", "tests", "testing", "docs", "doc", "examples", "example", "scripts"}
_NOT_THEIRS |= {"benchmark", "benchmarks", "tools", "bin", "src"}


def listed() -> dict[str, str | None]:
    """The packages that the image was built of: name to version, None where any will do."""
    found: dict[str, str | None] = {}
    for path in sorted(glob.glob(f"{LISTS}/*/requirements.txt"), reverse=True):
        with open(path) as file:
            for line in file:
                match = _PIN.match(line.strip())
                if match and not line.startswith("#"):
                    found[match[1]] = match[2]
    return found


def modules(name: str) -> list[str]:
    """What a package is imported as: its own name if it has it, else all that it brings."""
    tops = set()
    for path in metadata.files(name) or ():
        top = path.parts[0]
        if path.suffix not in (".py", ".so"):
            continue
        # A module's file may say more after a dot; a directory with one is no package.
        module = top if len(path.parts) > 1 else top.split(".")[0]
        if module.isidentifier() and not module.startswith("_") and module not in _NOT_THEIRS:
            tops.add(module)
    own = {top for top in tops if top.lower() == re.sub(r"[-.]+", "_", name).lower()}
    return sorted(own or tops)


def check(name: str, version: str | None) -> dict[str, Any]:
    """One package: its version as listed, and its import in a process of its own."""
    result: dict[str, Any] = {"name": name, "version": "", "seconds": 0.0, "problem": ""}
    try:
        result["version"] = metadata.version(name)
    except metadata.PackageNotFoundError:
        result["problem"] = "not installed"
        return result
    if version is not None and result["version"] != version:
        result["problem"] = f"the list has {version}"
        return result
    statement = "; ".join(f"import {module}" for module in modules(name)) or "pass"
    before = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", statement],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        result["problem"] = f"{statement}: not done after {PATIENCE_S} seconds"
        return result
    result["seconds"] = time.monotonic() - before
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it says nothing"]
        result["problem"] = f"{statement}: status {done.returncode}: {said[-1]}"
    return result


def probes() -> Iterator[tuple[str, str]]:
    """The commands that the image is to be able to run: name and shell text."""
    for path in sorted(glob.glob(f"{LISTS}/*/probes.txt")):
        with open(path) as file:
            for line in file:
                name, colon, command = line.partition(":")
                if colon and not line.startswith("#"):
                    yield name.strip(), command.strip()


def probe(name: str, command: str) -> dict[str, Any]:
    """One command, in a directory of its own."""
    os.makedirs(f"probe-{name}")
    before = time.monotonic()
    done = subprocess.run(
        # It ends what the shell has started, too.
        ["timeout", str(PATIENCE_S), "sh", "-ec", command],
        cwd=f"probe-{name}",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said = done.stdout.decode(errors="replace").strip().splitlines() or ["it says nothing"]
    problem = f"status {done.returncode}: {said[-1]}" if done.returncode else ""
    seconds = time.monotonic() - before
    return {"name": name, "version": "", "seconds": seconds, "problem": problem}


def main() -> None:
    """Checks all, each answered as soon as it is known."""
    for name, version in listed().items():
        print(json.dumps({"what": "package", **check(name, version)}), flush=True)
    for name, command in probes():
        print(json.dumps({"what": "program", **probe(name, command)}), flush=True)


if __name__ == "__main__":
    main()
