"""Recordings as `klong sft` trains on them: tokenised once, kept on disk, and read from there."""

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from klong_jax.core.jsonio import Json
from klong_jax.pipelines.config.training import TokenisedDataSection
from klong_jax.pipelines.dialect import dialect_identity
from klong_jax.pipelines.split import split_recording
from klong_jax.sft.cache import SHARD_CHARACTERS, build
from klong_jax.sft.corpus import TokenCorpus
from klong_jax.sft.data import Joined, WindowDataset, best_shared
from klong_jax.sft.mixture import Mixture, Source
from klong_jax.sft.shards import Tokenise, Tokenised
from klong_jax.sft.windows import CorpusGroups
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.splitting.recorded import SplitOptions, SplitRecording
from klong_jax.text.dialect import Dialect, cut_marker
from klong_jax.text.formats import Recording, recording_files

SHARED_MULTIPLE = 128
"""Of tokens of a shared prefix: what kernels of all platforms and common meshes divide."""

# With fewer short windows than this share of all, packing would spare few rows, and those that are
# packed take a path of attention of their own.
_MANY_SHORT = 0.25

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
    def marked(self) -> ContextPolicy:
        """The policy, with the dialect's marker."""
        return replace(self.policy, marker=cut_marker(self.dialect))

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
    draws: int,
    seed: int,
    together: int = 1,
    shared_prefix: int | Literal["auto"] = 0,
    rows_share: float = 1.0,
    pack: bool = False,
) -> WindowDataset:
    """The windows of recordings.

    Args:
        data: Where they are, and what becomes of bad ones.
        tokeniser: Tokenises them.
        cache: Folder of tokenised corpora, where the settings name none.
        console: Told what is passed over, cut and done.
        draws: Groups that training takes, for the weights of a mixture.
        seed: Seeds the order of a mixture.
        together: Most windows of one trajectory that make a group.
        shared_prefix: Tokens at the front of a group's windows that are computed once.
        rows_share: Rows of a micro-batch that may stay empty, as a share of a step's groups.
        pack: Whether short windows share a row, if there are many.

    Raises:
        UserError: A recording cannot be used and is not to be passed over, the cache is spoilt, or
            the mixture contradicts itself.
    """
    paths = [data.path, *(source.path for source in data.mix)]
    parts = [
        CorpusGroups(_corpus(path, data, tokeniser, cache, console), tokeniser.marked, together)
        for path in paths
    ]
    mixture = None
    if data.mix:
        first = Source(str(data.path), len(parts[0]), weight=1.0)
        others = [
            Source(str(source.path), len(part), source.weight, source.epochs)
            for source, part in zip(data.mix, parts[1:], strict=True)
        ]
        mixture = Mixture([first, *others], draws, seed)
    prefixes = [prefix for part in parts for prefix in part.prefixes()]
    limit = tokeniser.policy.limit
    if shared_prefix == "auto":
        shared = best_shared(prefixes, SHARED_MULTIPLE, limit, rows_share)
    else:
        shared = (shared_prefix,) if shared_prefix else ()
    left = [prefix_len for prefix_len, _ in prefixes]
    for length in reversed(shared):
        shorter = [prefix_len for prefix_len in left if prefix_len < length]
        console.print(
            f"{len(left) - len(shorter)} of {len(prefixes)} groups of windows compute {length} "
            "tokens of their pinned prefix once",
            markup=False,
        )
        left = shorter
    short, windows = sum(part.short for part in parts), sum(part.windows for part in parts)
    # Groups that share a prefix are never packed.
    if pack := pack and bool(left):
        pack = short >= _MANY_SHORT * windows
        console.print(
            f"{short} of {windows} windows fill at most half a row of {limit} tokens: "
            f"{'short windows share rows' if pack else 'each has a row of its own'}",
            markup=False,
        )
    return WindowDataset(
        name="trajectories",
        groups=Joined(parts),
        length=limit,
        shared=shared,
        prefix_trained=bool(shared) and any(part.trains_before(shared[-1]) for part in parts),
        whole=bool(left),
        pack=pack,
        mixture=mixture,
    )


def heldout_windows(
    data: TokenisedDataSection,
    tokeniser: Tokeniser,
    cache: Path,
    console: Console,
    *,
    pack: bool = False,
) -> WindowDataset | None:
    """The windows of the recordings that are not trained on, a trajectory a group, if any are.

    Raises:
        UserError: As `tokenised_windows`.
    """
    if data.heldout is None:
        return None
    corpus = _corpus(data.heldout, data, tokeniser, cache, console)
    groups = CorpusGroups(corpus, tokeniser.marked, sys.maxsize)
    return WindowDataset("held out", groups, tokeniser.policy.limit, pack=pack)


def _corpus(
    path: Path, data: TokenisedDataSection, tokeniser: Tokeniser, cache: Path, console: Console
) -> TokenCorpus:
    with console.status(f"tokenising {path}") as status:
        corpus = build(
            data.cache or cache,
            path,
            tokeniser.recipe,
            tokeniser,
            workers=data.workers or _workers(path),
            skip_bad=data.skip_bad,
            on_skip=lambda why: console.print(f"skipped: {why}", style="yellow", markup=False),
            on_progress=lambda trajectories, tokens: status.update(
                f"tokenising {path}: {trajectories} trajectories, {tokens:,} tokens"
            ),
        )
    console.print(
        f"{path}: {len(corpus)} trajectories, {corpus.total_tokens:,} tokens", markup=False
    )
    for remark in corpus.remarks[:_SHOWN_REMARKS]:
        console.print(remark, markup=False)
    if len(corpus.remarks) > _SHOWN_REMARKS:
        more = len(corpus.remarks) - _SHOWN_REMARKS
        console.print(f"... and {more} more such remarks; klong split tells of each trajectory")
    return corpus


def _workers(source: Path) -> int:
    """No more processes than there will be shards: starting one takes seconds."""
    size = sum(file.stat().st_size for file in recording_files(source) if file.exists())
    shards = size // SHARD_CHARACTERS
    return max(1, min(os.cpu_count() or 1, shards))


def _remarks(made: SplitRecording) -> Iterator[str]:
    if made.cut_turns:
        yield f"{len(made.cut_turns)} turns are cut to fit, {made.cut_tokens} tokens left out."
    if made.dropped:
        yield f"{len(made.dropped)} turns at the end are dropped."
    if restarts := sum(bool(turn.restart) for turn in made.turns):
        yield f"{restarts} turns begin windows of their own; klong split says which and why."
