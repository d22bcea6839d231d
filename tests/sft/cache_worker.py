"""A process of the cache's tests, which builds a corpus and may be killed while it does.

Arguments: cache, source, workers, a log that gets a line a recording tokenised, and after how many
shards the process kills itself (0: never).
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from klong_jax.core.errors import UserError
from klong_jax.core.trajectory import Turn
from klong_jax.sft.cache import build
from klong_jax.sft.corpus import TokenCorpus
from klong_jax.sft.shards import Tokenise, Tokenised
from klong_jax.text.formats import Recording


@dataclass(frozen=True)
class Characters:
    """Tokenises by code points; the first message is pinned.

    Attributes:
        log: Gets a line for each recording.
        deadly: Recordings of this name kill the process that tokenises them.
    """

    log: Path
    deadly: str = ""

    def __call__(self) -> Tokenise:
        return self.turns

    def turns(self, recording: Recording) -> Tokenised:
        if recording.recording_id == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.log.open("a") as handle:
            handle.write(f"{recording.recording_id}\n")
        if "refused" in recording.recording_id:
            raise UserError(f"{recording.source}: is refused; remove it.")
        texts = [tuple(map(ord, message.content)) for message in recording.messages]
        turns = tuple(Turn(a, b) for a, b in zip(texts[::2], texts[1::2], strict=False))
        return Tokenised(turns, len(texts[0]))


def made(
    root: Path,
    source: Path,
    log: Path,
    *,
    workers: int = 1,
    skip_bad: bool = False,
    skipped: list[str] | None = None,
    on_progress: Callable[[int, int], None] = lambda trajectories, tokens: None,
    deadly: str = "",
    shard_characters: int = 100,
) -> TokenCorpus:
    """Builds with small shards."""
    return build(
        root,
        source,
        {"tokenizer": "characters"},
        Characters(log, deadly),
        workers=workers,
        skip_bad=skip_bad,
        on_skip=[].append if skipped is None else skipped.append,
        on_progress=on_progress,
        shard_characters=shard_characters,
    )


def main() -> None:
    root, source, log = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[4])
    workers, deadly = int(sys.argv[3]), int(sys.argv[5])
    shards = 0

    def on_progress(trajectories: int, tokens: int) -> None:
        nonlocal shards
        shards += 1
        if shards == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    print(made(root, source, log, workers=workers, on_progress=on_progress).folder)


if __name__ == "__main__":
    main()
