"""`klong corpora`: the tokenised corpora on disk as a table, and removing those of no more use."""

import time
from collections.abc import Container, Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from klong_jax.pipelines.config.commands import CorporaConfig
from klong_jax.sft.inventory import Entry, inventory, remove, superfluous, sweep_removed

_DAY = 24 * 3600


def run(config: CorporaConfig) -> None:
    """Lists the corpora and, where asked, removes some."""
    console = Console()
    now = time.time()
    entries = inventory(config.path)
    going: list[Entry] = []
    if config.keep is not None or config.older_than_days is not None:
        days = config.older_than_days
        before = None if days is None else now - days * _DAY
        going = superfluous(entries, keep=config.keep, before=before)
    console.print(_table(entries, {entry.folder for entry in going}, now))
    console.print(f"{config.path}: {_said(entries)}", markup=False)
    if not config.prune:
        if going:
            console.print(f"may go: {_said(going)}; prune=true removes them")
        return
    sweep_removed(config.path)
    gone = [entry for entry in going if remove(entry)]
    console.print(f"removed: {_said(gone)}")
    if missed := len(going) - len(gone):
        console.print(f"left alone: {missed} that came into use meanwhile or are another user's")


def _table(entries: Sequence[Entry], going: Container[object], now: float) -> Table:
    table = Table()
    for name in ("corpus", "made of", "state"):
        table.add_column(name, overflow="fold")
    for name in ("trajectories", "tokens", "size", "last opened"):
        table.add_column(name, justify="right")
    for entry in entries:
        state = "in use" if entry.in_use else "may go" if entry.folder in going else entry.state
        table.add_row(
            entry.folder.name[:8],
            entry.source,
            state,
            f"{entry.trajectories:,}" if entry.source else "",
            f"{entry.tokens:,}" if entry.source else "",
            decimal(entry.bytes),
            f"{max(0.0, now - entry.opened) / _DAY:.1f} days ago",
        )
    return table


def _said(entries: Sequence[Entry]) -> str:
    name = "corpus" if len(entries) == 1 else "corpora"
    return f"{len(entries)} {name}, {decimal(sum(entry.bytes for entry in entries))}"
