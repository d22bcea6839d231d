"""A client of the storm: keeps sandboxes busy and journals what it asked and what it heard.

    python storm_client.py URL FOLDER IDLE_S [--abandon] SLOT ...

Each slot has one sandbox at a time, and a journal that a successor goes on with after a kill. Every
command appends its number to a file in the workspace, so that one that ran twice, or not at all,
shows. It ends when FOLDER/stop is there, after it has read those files.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from sandbox.client import (
    Limits,
    Sandbox,
    SandboxClient,
    SandboxError,
    SandboxGone,
    SandboxRefused,
    SandboxSpec,
    Session,
)

# The service is expected back, however busy the machine.
RECONNECT_S = 300.0

# Of how many slots one has a disk of its own.
DISK_EVERY = 4

# What a session leaves running; its argument finds it among this machine's processes.
DAEMON = f"sleep {os.environ.get('STORM_SLEEP', '271828')}"

Row = dict[str, Any]


class Journal:
    """Lines of what was asked and heard; a line is on file before what follows it is done."""

    def __init__(self, path: Path) -> None:
        self.rows = read_journal(path)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, **row: Any) -> None:
        os.write(self._fd, json.dumps(row).encode() + b"\n")
        self.rows.append(row)


def read_journal(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Slot:
    """One sandbox after another, each with numbered operations."""

    def __init__(self, client: SandboxClient, folder: Path, slot: int, idle_s: float) -> None:
        self.client, self.folder, self.slot = client, folder, slot
        self.spec = SandboxSpec(
            idle_s=idle_s,
            limits=Limits(memory_mb=128, pids=64, disk_mb=None if slot % DISK_EVERY else 16),
            labels={"slot": str(slot)},
        )
        self.journal = Journal(folder / f"slot-{slot}.jsonl")
        self.rng = random.Random()
        self.box: Sandbox | None = None
        self.session: Session | None = None
        self.rows: list[Row] = []

    def abandon(self) -> None:
        """Forgets the sandbox of a killed predecessor; nobody will ask for it any more."""
        if box_id := self._current():
            self.journal.write(abandoned=box_id)

    async def work(self) -> None:
        stop = self.folder / "stop"
        while not stop.exists():
            try:
                await self._open()
                while not stop.exists():
                    await self._operate()
                    await asyncio.sleep(self.rng.uniform(0, 0.2))
            except SandboxGone as error:
                await self._end(lost=f"{error.kind}: {error}")
        if self._current():
            try:
                await self._open()
                await self._end()
            except SandboxGone as error:
                await self._end(lost=f"{error.kind}: {error}")

    def _current(self) -> str | None:
        """The sandbox that the journal ends with."""
        last: str | None = None
        for row in self.journal.rows:
            if "box" in row:
                last = row["box"]
            elif "ended" in row or "abandoned" in row:
                last = None
        return last

    async def _open(self) -> None:
        """Attaches to the journal's sandbox and asks again what had no answer, or makes one."""
        box_id = self._current()
        if box_id is None:
            self.box = await self.client.create(self.spec)
            self.journal.write(box=self.box.id)
        elif self.box is None or self.box.id != box_id:
            self.box = None
            self.box = await self.client.attach(box_id)
        rows = self.journal.rows
        start = max(i for i, row in enumerate(rows) if "box" in row)
        self.rows = rows[start + 1 :]
        with contextlib.suppress(SandboxRefused):  # It is open already.
            await self.box.session("work")
        self.session = self.box.attach_session("work")
        asked = [row for row in self.rows if "ask" in row]
        if asked and not any(row.get("got") == asked[-1]["ask"] for row in self.rows):
            await self._send(asked[-1]["ask"], asked[-1]["kind"])

    async def _operate(self) -> None:
        number = sum("ask" in row for row in self.rows)
        kind = self.rng.choice(["exec", "exec", "run", "run", "write"])
        self._note(ask=number, kind=kind)
        await self._send(number, kind)

    def _note(self, **row: Any) -> None:
        self.journal.write(**row)
        self.rows.append(row)

    async def _send(self, number: int, kind: str) -> None:
        assert self.box is not None and self.session is not None
        operation = f"storm-{self.slot}-{number}"
        pause = self.rng.choice(["", "sleep 0.2; "])
        if kind == "write":
            await self.box.write(f"files/{number}", f"written {number}")
            heard = ""
        elif kind == "exec":
            command = f"echo {number} >>log; {pause}echo {number}"
            heard = (await self.box.exec(command, operation=operation)).stdout
        else:
            command = f"n=$((n+1)); echo {number} >>log; {pause}[ $n = 1 ] && {DAEMON} & echo $n"
            heard = (await self.session.run(command, operation=operation)).stdout
        self._note(got=number, heard=heard)

    async def _end(self, lost: str | None = None) -> None:
        """Reads the files, lets the sandbox go, and journals why."""
        row: Row = {"ended": self._current(), "lost": lost, "log": None, "files": {}}
        if self.box is not None:
            # A sandbox that is lost, but not removed yet, still has its files.
            with contextlib.suppress(SandboxError):
                row["log"] = (await self.box.read("log")).decode()
                for done in [r["got"] for r in self.rows if "got" in r][-20:]:
                    if any(r.get("ask") == done and r["kind"] == "write" for r in self.rows):
                        row["files"][done] = (await self.box.read(f"files/{done}")).decode()
        if row["ended"] is not None:
            self.journal.write(**row)
        if self.box is not None:
            await self.box.close()
        self.box = self.session = None


async def main(url: str, folder: Path, idle_s: float, slots: list[int], *, new: bool) -> None:
    async with SandboxClient(url, reconnect_s=RECONNECT_S) as client, asyncio.TaskGroup() as tasks:
        for number in slots:
            slot = Slot(client, folder, number, idle_s)
            if new:
                slot.abandon()
            tasks.create_task(slot.work())


if __name__ == "__main__":
    url, folder, idle, *rest = sys.argv[1:]
    numbers = [int(word) for word in rest if word != "--abandon"]
    asyncio.run(main(url, Path(folder), float(idle), numbers, new="--abandon" in rest))
