"""A storm of kills over a service, its sandboxes and its clients, and what it must not break.

    python tests/sandbox/storm.py --kills 200 --sandboxes 32 --backend docker --seed 0

Ends with a table, or with what was broken and exit status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storm_client import read_journal

from sandbox.client import SandboxClient, SandboxInfo

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).with_name("storm_client.py")

# Sandboxes of one client process.
PER_CLIENT = 4

# Services in a row that are killed before they serve.
MAX_STILLBORN = 2

# Who is killed how often.
VICTIMS = {"service": 5, "agent": 4, "sandbox": 4, "client": 5}


@dataclass
class Outcome:
    """What a storm has shown."""

    kills: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    survivors: int = 0
    lost: int = 0
    broken: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kills = ", ".join(f"{count} {victim}" for victim, count in sorted(self.kills.items()))
        said = f"killed {kills}; {self.acknowledged} results, {self.survivors} sandboxes ended "
        said += f"as asked, {self.lost} lost to kills"
        return "\n".join([said, *self.broken])


class Storm:
    """One storm, over a service of its own."""

    def __init__(
        self,
        folder: Path,
        *,
        backend: str,
        kills: int,
        sandboxes: int,
        seed: int,
        gap_s: float,
        idle_s: float,
    ) -> None:
        """Describes it.

        Args:
            folder: Where its state directory, journals and logs are made.
            backend: "local" or "docker".
            kills: How many.
            sandboxes: How many at a time.
            seed: Of who is killed when.
            gap_s: Mean time between kills.
            idle_s: After which a sandbox is reaped that nobody asks for any more.
        """
        self.folder, self.state_dir = folder, folder / "state"
        self.journals = folder / "journals"
        self.journals.mkdir()
        self.backend, self.kills, self.gap_s, self.idle_s = backend, kills, gap_s, idle_s
        self.rng = random.Random(seed)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.sleep = f"{200_000 + os.getpid()}.{seed}"
        slots = range(sandboxes)
        self.shares = [list(slots[i : i + PER_CLIENT]) for i in range(0, sandboxes, PER_CLIENT)]
        self.clients: list[subprocess.Popen[bytes]] = []
        self.stillborn = 0
        self.killed: set[str] = set()
        self.orphaned: set[str] = set()
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Load, kills, end; every check notes what is broken."""
        self.service = self._serve()
        try:
            self.clients = [self._client(share) for share in self.shares]
            self._await_boxes()
            while sum(self.outcome.kills.values()) < self.kills:
                time.sleep(self.rng.expovariate(1 / self.gap_s))
                self._kill()
                self._revive()
            self._await_boxes()
            (self.journals / "stop").touch()
            for client in self.clients:
                if client.wait(180) != 0:
                    self.outcome.broken.append(f"a client ended with status {client.returncode}")
            self._verify()
            self._await_reaper()
            self.service.terminate()
            if (status := self.service.wait(60)) != 0:
                self.outcome.broken.append(f"the service ended with status {status}")
            self._find_left("after the service's end", service_lives=False)
        finally:
            for process in self.clients:
                process.kill()
                process.wait()
            # Where a check raised, what lives goes with the service, or with its successor.
            if sys.exc_info()[0] is not None and self.service.poll() is not None:
                self.service = self._serve()
                time.sleep(5)
            self.service.terminate()
            self.service.wait()
        return self.outcome

    def _serve(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sandbox", "serve", "--backend", self.backend]
        command += ["--port", str(self.port), "--state-dir", str(self.state_dir)]
        with (self.folder / "service.log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def _client(self, share: list[int], *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(CLIENT), self.url, str(self.journals), str(self.idle_s)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "STORM_SLEEP": self.sleep}
        with (self.folder / "clients.log").open("ab") as log:
            return subprocess.Popen(
                [*command, *options, *map(str, share)], cwd=ROOT, env=env, stdout=log, stderr=log
            )

    def _await_boxes(self) -> None:
        """Until each slot has a sandbox that answers."""
        deadline = time.monotonic() + 120
        while not all(self.busy(slot) for share in self.shares for slot in share):
            if time.monotonic() > deadline:
                raise AssertionError(
                    "a slot has no sandbox that answers; see service.log and clients.log"
                )
            time.sleep(0.1)

    def busy(self, slot: int) -> str | None:
        """The sandbox of a slot that has had results, by its journal."""
        box, heard = None, False
        for row in self._journal(slot):
            if "box" in row:
                box, heard = row["box"], False
            elif "ended" in row or "abandoned" in row:
                box = None
            heard = heard or "got" in row
        return box if heard else None

    def _journal(self, slot: int) -> list[dict[str, Any]]:
        return read_journal(self.journals / f"slot-{slot}.jsonl")

    def _kill(self) -> None:
        victim = self.rng.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        share = self.rng.randrange(len(self.shares))
        slot = self.rng.choice(self.shares[share])
        if victim == "service":
            self._kill_service()
        elif victim == "client":
            self.clients[share].kill()
            self.clients[share].wait()
            self.orphaned |= {box for slot in self.shares[share] if (box := self.busy(slot))}
        else:
            box = self.busy(slot)
            if box is None or not self._kill_box(box, victim):
                return
        self.outcome.kills[victim] += 1
        with (self.folder / "kills.log").open("a") as log:
            print(f"{time.time():.3f} {victim} {slot}", file=log)

    def _kill_service(self) -> None:
        """Also while it starts, but not so often that it never comes up."""
        up = self._is_up()
        while not up and self.stillborn >= MAX_STILLBORN and self.service.poll() is None:
            time.sleep(0.1)
            up = self._is_up()
        self.stillborn = 0 if up else self.stillborn + 1
        self.service.kill()
        self.service.wait()

    def _is_up(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5):
            return True
        return False

    def _kill_box(self, box: str, victim: str) -> bool:
        pid = outer(box) if self.backend == "local" else container_pid(box)
        if pid is None:
            return False
        self.killed.add(box)
        if victim == "agent":
            agent = child(pid) if self.backend == "local" else pid
            if agent is None:
                return False
            with suppress(ProcessLookupError):
                os.kill(agent, signal.SIGKILL)
        elif self.backend == "local":
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        else:
            docker("kill", f"klong-{box}")
        return True

    def _revive(self) -> None:
        """What was killed is started again at once; some clients' sandboxes are left to expire."""
        if self.service.poll() is not None:
            if self.service.returncode != -signal.SIGKILL:
                self.outcome.broken.append(f"the service died: {self.service.returncode}")
            self.service = self._serve()
        for index, client in enumerate(self.clients):
            if client.poll() is not None:
                if client.returncode != -signal.SIGKILL:
                    self.outcome.broken.append(f"a client died: {client.returncode}")
                options = ["--abandon"] if self.rng.random() < 0.2 else []
                self.clients[index] = self._client(self.shares[index], *options)

    def _verify(self) -> None:
        for share in self.shares:
            for slot in share:
                for said in self._verify_slot(slot):
                    self.outcome.broken.append(f"slot {slot}: {said}")

    def _verify_slot(self, slot: int) -> list[str]:
        broken: list[str] = []
        box, asked, got = "", {}, {}
        for row in self._journal(slot):
            if "box" in row:
                box, asked, got = row["box"], dict[int, str](), dict[int, str]()
            elif "ask" in row:
                asked[row["ask"]] = row["kind"]
            elif "got" in row:
                got[row["got"]] = row["heard"]
                self.outcome.acknowledged += 1
            elif row.get("ended") == box:
                broken += [f"{box}: {said}" for said in self._verify_box(row, asked, got)]
        return broken

    def _verify_box(
        self, row: dict[str, Any], asked: dict[int, str], got: dict[int, str]
    ) -> list[str]:
        """Each command that was answered ran once, with the answer it had; none ran twice."""
        broken = []
        if row["lost"] is None:
            self.outcome.survivors += 1
        else:
            self.outcome.lost += 1
            # A client that came back too late finds that its sandbox was idle for too long.
            late = row["ended"] in self.orphaned & self._idle()
            if row["ended"] not in self.killed and not late:
                broken.append(f"was lost although nobody killed it: {row['lost']}")
        runs = [number for number, kind in asked.items() if kind == "run"]
        for number, heard in got.items():
            kind = asked[number]
            true = {"exec": f"{number}\n", "write": ""}.get(kind)
            if kind == "run":
                true = f"{runs.index(number) + 1}\n"
            if heard != true:
                broken.append(f"operation {number} ({kind}) answered {heard!r}, not {true!r}")
        commands = {number for number in got if asked[number] != "write"}
        if row["log"] is None:
            if row["lost"] is None and commands:
                broken.append("its files could not be read")
            return broken
        ran = Counter(map(int, row["log"].split()))
        broken += [
            f"operation {number} ran {count} times" for number, count in ran.items() if count > 1
        ]
        broken += [
            f"operation {number} was answered and never ran" for number in commands - set(ran)
        ]
        broken += [f"operation {number} was never asked" for number in set(ran) - set(asked)]
        for number, text in row["files"].items():
            if text != f"written {number}":
                broken.append(f"file {number} holds {text!r}")
        return broken

    def _await_reaper(self) -> None:
        """Sandboxes that nobody asks for any more go by themselves, while the service lives."""

        async def living() -> list[SandboxInfo]:
            async with SandboxClient(self.url, reconnect_s=30) as client:
                return await client.list()

        deadline = time.monotonic() + self.idle_s + 30
        while (left := asyncio.run(living())) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.outcome.broken += [f"sandbox {info.id} was not reaped" for info in left]
        # A removal under way is none of these any more, and ends soon.
        while self._left(service_lives=True) and time.monotonic() < deadline + 10:
            time.sleep(0.5)
        self._find_left("after the reaper's period", service_lives=True)

    def _find_left(self, when: str, *, service_lives: bool) -> None:
        self.outcome.broken += [f"left {when}: {one}" for one in self._left(service_lives)]

    def _left(self, service_lives: bool) -> list[str]:
        state = str(self.state_dir)
        left = [
            f"mount {line}"
            for line in Path("/proc/mounts").read_text().splitlines()
            if state in line
        ]
        loops = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=False)
        left += [f"loop device {line}" for line in loops.stdout.splitlines() if state in line]
        if self.backend == "docker":
            found = docker("ps", "-aq", "--filter", f"label=klong.state={state}/docker").split()
            left += [f"container {name}" for name in found]
        ids = self._ids()
        left += [
            f"control group {parent}/{name}"
            for parent, names, _ in os.walk("/sys/fs/cgroup")
            for name in names
            if name in ids
        ]
        mine = {self.service.pid, os.getpid()}
        left += [
            f"process {said}"
            for pid, said in processes([state, self.sleep, *ids])
            if pid not in mine
        ]
        # A service's end leaves the store, and where snapshots are, of which there are none.
        kept = {"store.db", "store.db-wal", "store.db-shm", "snapshots"}
        for path in self.state_dir.glob("*/*"):
            if path.name not in kept and not service_lives:
                left.append(f"directory {path}")
        files = (path for path in self.state_dir.glob("*/snapshots/**/*") if path.is_file())
        left += [f"of a snapshot {path}" for path in files]
        left += [f"directory {path}" for path in self.state_dir.glob("*/*/sb-*")]
        left += [f"socket {path}" for path in self.state_dir.rglob("*.sock")]
        return left

    def _ids(self) -> set[str]:
        """Every sandbox that was ever asked for."""
        return self._logged("1")

    def _idle(self) -> set[str]:
        """Those that the service has reaped because nobody asked for them."""
        return self._logged("kind = 'close' AND facts LIKE '%\"idle\"%'")

    def _logged(self, where: str) -> set[str]:
        store = self.state_dir / self.backend / "store.db"
        with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db:
            return {
                row[0] for row in db.execute(f"SELECT DISTINCT sandbox FROM events WHERE {where}")
            }


def outer(box: str) -> int | None:
    """The bubblewrap of a sandbox, which stands outside of it."""
    for pid, said in processes([f"KLONG_SANDBOX={box}"]):
        if said.startswith("bwrap "):
            return pid
    return None


def child(pid: int) -> int | None:
    with suppress(OSError):
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(found[0]) if found else None
    return None


def container_pid(box: str) -> int | None:
    said = docker("inspect", "-f", "{{.State.Pid}}", f"klong-{box}").strip()
    return int(said) if re.fullmatch(r"[1-9]\d*", said) else None


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    return done.stdout


def processes(words: list[str]) -> list[tuple[int, str]]:
    """This machine's processes with one of the words in their arguments or environment."""
    found = []
    sought = [word.encode() for word in words]
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            arguments = (path / "cmdline").read_bytes()
            text = arguments + b"\0" + (path / "environ").read_bytes()
            if arguments and any(word in text for word in sought):
                said = arguments.replace(b"\0", b" ").decode(errors="replace")
                found.append((int(path.name), Path(said).name if said.startswith("/") else said))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--sandboxes", type=int, default=32)
    parser.add_argument("--backend", choices=("local", "docker"), default="local")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gap", type=float, default=1.0, help="mean seconds between kills")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="klong-storm-", dir="/tmp"))
    folder.chmod(0o711)
    print(f"{folder}: journals and logs", flush=True)
    began = time.monotonic()
    outcome = Storm(
        folder,
        backend=options.backend,
        kills=options.kills,
        sandboxes=options.sandboxes,
        seed=options.seed,
        gap_s=options.gap,
        idle_s=15.0,
    ).run()
    print(f"{time.monotonic() - began:.0f} s: {outcome}")
    return 1 if outcome.broken else 0


if __name__ == "__main__":
    sys.exit(main())
