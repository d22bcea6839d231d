"""A tokenised corpus on disk, opened without reading its tokens."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from klong_jax.sft.hold import Hold
from klong_jax.sft.sealed import read_sealed, spoilt, write_sealed
from klong_jax.sft.shards import CONTEXT, RESTART, TOKENS, TURNS, Shard, open_shard

VERSION = 2
"""Of the layout on disk; another one is another entry of the cache."""

INDEX = "index.json"

# Each is an open file, and a process may have about a thousand.
_OPEN_SHARDS = 64


@dataclass(frozen=True, eq=False)
class StoredTrajectory:
    """A recorded trajectory as it lies on disk.

    Attributes:
        recording_id: Its name.
        source: File and position it was read from when the corpus was made.
        prefix_len: Tokens of the pinned prefix.
        turn_lengths: int64[turns, 2], each turn's environment and output tokens.
        restarts: bool[turns], whether a window begins with the turn whatever fits.
        trained: bool[turns], whether the turn's output is trained.
        tokens: int32[sum of turn_lengths], the turns end to end; read when it is touched.
    """

    recording_id: str
    source: str
    prefix_len: int
    turn_lengths: np.ndarray
    restarts: np.ndarray
    trained: np.ndarray
    tokens: np.ndarray


class TokenCorpus:
    """The trajectories of one source, by number, in the source's order.

    Attributes:
        folder: Where it lies.
        skipped: Why records of the source were passed over, a sentence each.
        remarks: What is to be told of the others, a sentence each.
    """

    def __init__(self, folder: Path, held: Hold | None = None) -> None:
        """Opens a complete corpus.

        Args:
            folder: Where it lies.
            held: Keeps it from being removed for as long as this object lives.

        Raises:
            UserError: It is not complete, of another version, or a file was altered; names it.
        """
        index, _ = read_sealed(folder / INDEX, folder)
        if index["version"] != VERSION:
            raise spoilt(
                folder / INDEX, f"has version {index['version']} instead of {VERSION}", folder
            )
        self.folder, self._held = folder, held
        self._shards = [_open(folder / name, digest) for name, digest in index["shards"]]
        self.skipped = tuple(chain.from_iterable(shard.skipped for shard in self._shards))
        self.remarks = tuple(chain.from_iterable(shard.remarks for shard in self._shards))
        self._lengths = np.concatenate([shard.lengths for shard in self._shards])
        self._first = np.cumsum([0, *(len(shard.lengths) for shard in self._shards)])
        self._opened = lru_cache(_OPEN_SHARDS)(self._open_arrays)

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def total_tokens(self) -> int:
        """Tokens of all trajectories."""
        return int(self._lengths[:, 1].sum())

    def prefix_len(self, number: int) -> int:
        """Tokens of a trajectory's pinned prefix."""
        return int(self._lengths[number, 2])

    def trajectory(self, number: int) -> StoredTrajectory:
        """One of the trajectories.

        Raises:
            IndexError: There are fewer.
            UserError: A file was altered since the corpus was opened.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"trajectory {number} of {len(self)}")
        place = int(np.searchsorted(self._first, number, side="right")) - 1
        shard = self._shards[place]
        within = number - int(self._first[place])
        tokens, turns, ends, names = self._opened(place)
        turn_end, token_end, _ = (int(end) for end in ends[within])
        turn_count, token_count, prefix_len = (int(length) for length in shard.lengths[within])
        name, source = names[within]
        turns = turns[turn_end - turn_count : turn_end]
        return StoredTrajectory(
            recording_id=name,
            source=source,
            prefix_len=prefix_len,
            turn_lengths=turns[:, :2],
            restarts=turns[:, 2] & RESTART > 0,
            trained=turns[:, 2] & CONTEXT == 0,
            tokens=tokens[token_end - token_count : token_end],
        )

    def verify(self) -> None:
        """Reads all of it and compares checksums.

        Raises:
            UserError: A file is not as it was written; names it.
        """
        for shard in self._shards:
            shard.verify()

    def _open_arrays(
        self, place: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[str, str]]]:
        shard = self._shards[place]
        ends = np.cumsum(shard.lengths, axis=0)
        return shard.array(TOKENS), shard.array(TURNS), ends, shard.names()


def write_index(folder: Path, shards: list[Shard], source: Path) -> None:
    """Completes a corpus, made of a source: from now on it counts."""
    body = {
        "version": VERSION,
        "shards": [(shard.folder.name, shard.digest) for shard in shards],
        "source": str(source),
        "trajectories": sum(len(shard.lengths) for shard in shards),
        "tokens": sum(int(shard.lengths[:, 1].sum()) for shard in shards),
    }
    write_sealed(folder / INDEX, body)


def _open(folder: Path, digest: str) -> Shard:
    shard = open_shard(folder)
    if shard.digest != digest:
        raise spoilt(folder, "is not the shard that the corpus was made with", folder.parent)
    return shard
