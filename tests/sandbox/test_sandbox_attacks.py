"""Hostile programs against each isolating backend, all in two sandboxes, and their table.

`python tests/sandbox/test_sandbox_attacks.py` writes the table into sandbox/README.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hostile
import hostile_calls
import hostile_egress
import hostile_host
import hostile_outside
import pytest
from egress_helpers import require_egress, upstream
from sandbox_helpers import make_backend, open_directory, require

from sandbox.backends import seccomp
from sandbox.client import Egress, Limits, Sandbox, SandboxClient, SandboxSpec
from sandbox.service import embedded
from sandbox.spec import MB

README = Path(__file__).parents[2] / "sandbox/README.md"
_BEGIN, _END = "<!-- attacks: written by tests/sandbox/test_sandbox_attacks.py -->", "<!-- end -->"

LIMITS = Limits(
    memory_mb=128,
    pids=64,
    open_files=256,
    files_mb=16,
    disk_mb=32,
    inodes=1500,
    output_bytes=4096,
)

EGRESS = Egress(
    allow=(hostile_egress.OPEN, "github.com", "*.github.com", "*.githubusercontent.com"),
    block=("https://github.com/org/secret",),
    packages=("pypi",),
    block_packages=("secret",),
)


def table() -> str:
    rows = ["| attack | outcome | by |", "|---|---|---|"]
    for attack in hostile.ATTACKS:
        other = f" (docker: {attack.docker})" if attack.docker != attack.outcome else ""
        rows.append(f"| {attack.what} | {attack.outcome}{other} | {attack.mechanism} |")
    for act in hostile_outside.ATTACKS:
        rows.append(f"| {act.what} | {act.outcome} | {act.mechanism} |")
    return "\n".join(rows)


def _with_table(text: str) -> str:
    head, rest = text.split(_BEGIN)
    return f"{head}{_BEGIN}\n\n{table()}\n\n{_END}{rest.split(_END)[1]}"


def test_the_table_of_the_readme_is_the_list() -> None:
    text = README.read_text()
    assert _with_table(text) == text, "run: python tests/sandbox/test_sandbox_attacks.py"


def _addresses() -> list[str]:
    shown = subprocess.run(["ip", "-4", "-o", "addr"], capture_output=True, text=True, check=True)
    found = re.findall(r"inet ([0-9.]+)", shown.stdout)
    return [address for address in found if not address.startswith("127.")]


def _facts(url: str, state_dir: Path, abstract: str) -> dict[str, object]:
    column = 0 if platform.machine() == "x86_64" else 1
    denied = {name: pair[column] for name, pair in seccomp.DENIED.items() if pair[column]}
    others = {name: pair[column] for name, (pair, _) in seccomp.CONDITIONAL.items()}
    return {
        "calls": {**denied, **others, **seccomp.ABSENT},
        "denied": sorted(denied),
        "port": int(url.rpartition(":")[2]),
        "addresses": _addresses(),
        "abstract": abstract,
        "state_dir": str(state_dir),
        "host_word": "pytest",
        "file_bytes": LIMITS.files_mb * MB,
    }


@pytest.fixture(params=["local-bubblewrap", pytest.param("docker", marks=pytest.mark.docker)])
def kind(request: pytest.FixtureRequest) -> str:
    require(request.param)
    return str(request.param)


@pytest.fixture
def abstract() -> Iterator[str]:
    """An abstract Unix socket of the host's, which listens."""
    name = f"klong-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        yield name


async def _inside(box: Sandbox, facts: dict[str, object], *modules: ModuleType) -> dict[str, str]:
    """What the programs of modules come to."""
    for module in modules:
        assert module.__file__
        await box.write(f"{module.__name__}.py", Path(module.__file__).read_bytes())
    names = ", ".join(module.__name__ for module in modules)
    run = f"python3 -c 'import {names}; hostile.main()'"
    inside = await box.exec(run, stdin=json.dumps(facts), timeout_s=60)
    assert inside.exit_code == 0, inside
    found: dict[str, str] = json.loads(inside.stdout)
    return found


def _host() -> dict[str, str]:
    """What no attack may change."""
    names = ("core_pattern", "hostname", "shmmax")
    return {name: Path(f"/proc/sys/kernel/{name}").read_text() for name in names}


@pytest.mark.skipif(os.getuid() != 0, reason="quotas, which are attacked, too, need root")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="calls machine code")
def test_attacks_come_to_what_the_list_says(kind: str, abstract: str) -> None:
    async def main(url: str, root: Path) -> dict[str, str]:
        facts = _facts(url, root / "state", abstract)
        spec = SandboxSpec(limits=LIMITS)
        async with (
            SandboxClient(url) as client,
            await client.create(spec) as box,
            await client.create(spec) as peer,
        ):
            found = await _inside(box, facts, hostile, hostile_calls, hostile_host)
            async with await client.create(SandboxSpec(limits=LIMITS, egress=EGRESS)) as other:
                found |= await _inside(other, facts, hostile, hostile_egress)
            scene = hostile_outside.Scene(box, peer, root / "outside")
            for attack in hostile_outside.ATTACKS:
                found[attack.what] = await attack.program(scene)
                alive = await box.exec("echo works")
                assert alive.stdout == "works\n", f"{attack.what}: {alive}"
        return found

    require_egress()
    before = _host()
    with open_directory() as root:
        (root / "outside").mkdir()
        (root / "outside").chmod(0o777)
        with (
            upstream(root) as (settings, asked),
            embedded(make_backend(kind, root / "state"), egress=settings) as url,
        ):
            found = asyncio.run(main(url, root))
        assert asked and not [one for one in asked if "ecret" in one]
        assert not list((root / "state").glob("*/*/sb-*"))
        assert str(root) not in Path("/proc/mounts").read_text()
    expected = {
        attack.what: attack.docker if kind == "docker" else attack.outcome
        for attack in hostile.ATTACKS
    }
    expected |= {attack.what: attack.outcome for attack in hostile_outside.ATTACKS}
    different = {
        what: (found.get(what), was) for what, was in expected.items() if found.get(what) != was
    }
    assert not different, "\n".join(f"{what}: {pair}" for what, pair in different.items())
    assert _host() == before


if __name__ == "__main__":
    README.write_text(_with_table(README.read_text()))
