"""Recordings as `klong sft` trains on them: tokenised once, kept on disk, and read from there."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from klong_jax.core.jsonio import Json
from klong_jax.pipelines.config.training import TokenisedDataSection
from klong_jax.pipelines.dialect import dialect_identity
from klong_jax.pipelines.split import split_recording
from klong_jax.sft.cache import SHARD_CHARACTERS, build
from klong_jax.sft.data import WindowDataset, best_shared
from klong_jax.sft.shards import Tokenise, Tokenised
from klong_jax.sft.windows import CorpusGroups
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.splitting.recorded import SplitOptions, SplitRecording
from klong_jax.text.dialect import Dialect
from klong_jax.text.formats import Recording

SHARED_MULTIPLE = 128
"""Of tokens of a shared prefix: what kernels of all platforms and common meshes divide."""

# Of the readers of formats and of this module: another one may tokenise otherwise.
_VERSION = 1
_SHOWN_REMARKS = 5


@dataclass(frozen=True)
class Tokeniser:
    """Tokenises recordings in any process, each cut to fit as the agent would have cut it.

    Attributes:
        dialect: How they are written.
        policy: The context policy.
        options: What the policy leaves open.
    """

    dialect: Dialect
    policy: ContextPolicy
    options: SplitOptions

    @property
    def recipe(self) -> dict[str, Json]:
        """Everything that decides the tokens of a recording."""
        return {
            "version": _VERSION,
            "tokenizer": self.dialect.tokenizer.content_hash,
            "dialect": dialect_identity(self.dialect),
            "policy": asdict(self.policy),
            "options": asdict(self.options),
        }

    def __call__(self) -> Tokenise:
        """What tokenises a recording."""
        return self._tokenise

    def _tokenise(self, recording: Recording) -> Tokenised:
        made = split_recording(self.dialect, recording, self.policy, self.options)
        return Tokenised(made.turns, made.prefix_len, tuple(_remarks(made)))


def tokenised_windows(
    data: TokenisedDataSection,
    tokeniser: Tokeniser,
    cache: Path,
    console: Console,
    *,
    together: int = 1,
    shared_prefix: int | Literal["auto"] = 0,
) -> WindowDataset:
    """The windows of recordings.

    Args:
        data: Where they are, and what becomes of bad ones.
        tokeniser: Tokenises them.
        cache: Folder of tokenised corpora, where the settings name none.
        console: Told what is passed over, cut and done.
        together: Most windows of one trajectory that make a group.
        shared_prefix: Tokens at the front of a group's windows that are computed once.

    Raises:
        UserError: A recording cannot be used and is not to be passed over, or the cache is spoilt.
    """
    with console.status(f"tokenising {data.path}") as status:
        corpus = build(
            data.cache or cache,
            data.path,
            tokeniser.recipe,
            tokeniser,
            workers=data.workers or _workers(data.path),
            skip_bad=data.skip_bad,
            on_skip=lambda why: console.print(f"skipped: {why}", style="yellow", markup=False),
            on_progress=lambda trajectories, tokens: status.update(
                f"tokenising {data.path}: {trajectories} trajectories, {tokens:,} tokens"
            ),
        )
        groups = CorpusGroups(corpus, tokeniser.policy, together)
    for remark in corpus.remarks[:_SHOWN_REMARKS]:
        console.print(remark, markup=False)
    if len(corpus.remarks) > _SHOWN_REMARKS:
        more = len(corpus.remarks) - _SHOWN_REMARKS
        console.print(f"... and {more} more such remarks; klong split tells of each trajectory")
    shared = shared_prefix
    if shared == "auto":
        shared = best_shared(groups.prefixes(), SHARED_MULTIPLE)
    if shared:
        sharing = sum(prefix_len >= shared for prefix_len, _ in groups.prefixes())
        console.print(
            f"{sharing} of {len(groups)} groups of windows compute {shared} tokens of their pinned "
            "prefix once",
            markup=False,
        )
    trained = bool(shared) and groups.trains_before(shared)
    return WindowDataset("trajectories", groups, tokeniser.policy.limit, shared, trained)


def _workers(source: Path) -> int:
    """No more processes than there will be shards: starting one takes seconds."""
    shards = source.stat().st_size // SHARD_CHARACTERS if source.exists() else 1
    return max(1, min(os.cpu_count() or 1, shards))


def _remarks(made: SplitRecording) -> Iterator[str]:
    if made.cut_turns:
        yield f"{len(made.cut_turns)} turns are cut to fit, {made.cut_tokens} tokens left out."
    if made.dropped:
        yield f"{len(made.dropped)} turns at the end are dropped."
    if restarts := sum(bool(turn.restart) for turn in made.turns):
        yield f"{restarts} turns begin windows of their own; klong split says which and why."
