"""Tokenising a source once: a cache of corpora on disk, each found by what its tokens depend on.

A corpus is made shard by shard. A shard that is there is complete and is never made again, so a
build that was killed goes on where it was; a corpus counts when its index is there, which is
written last. Of two processes that want the same corpus, one makes it and the other waits. Nobody
removes one that is made or read.
"""

import fcntl
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import Json, content_hash
from klong_jax.sft.corpus import INDEX, VERSION, TokenCorpus, write_index
from klong_jax.sft.hold import hold
from klong_jax.sft.sealed import spoilt
from klong_jax.sft.shards import Shard, Tokenise, hash_records, open_shard, sweep, write_shard
from klong_jax.text.formats import Recording, read_recordings, recording_files

TokeniseFactory = Callable[[], Tokenise]
"""Makes the function that tokenises, in each process that does; must be picklable."""

SHARD_CHARACTERS = 8_000_000
"""Text of a shard, a trajectory more or less: some two million tokens, a second or two of work."""

_LOCK = ".lock"  # of the one that makes it

# In a process of the pool: makes its tokenise function, once.
_own_tokenise: TokeniseFactory


@dataclass(frozen=True)
class _Job:
    """A shard to be: its folder and its records."""

    folder: Path
    records: list[Recording | str]


def corpus_key(source: Path, recipe: dict[str, Json]) -> str:
    """Names the corpus of a source.

    Args:
        source: A file of recordings, or a folder of them; their content counts, not their names.
        recipe: Everything that decides tokens: tokenizer, dialect, pinning and fitting.

    Raises:
        UserError: The source cannot be read.
    """
    digests = [_digest(file) for file in recording_files(source)]
    of_source: Json = digests if source.is_dir() else digests[0]
    return content_hash({"version": VERSION, "source": of_source, "recipe": recipe})


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); name a file with recordings."
        ) from None


def build(
    root: Path,
    source: Path,
    recipe: dict[str, Json],
    tokenise_factory: TokeniseFactory,
    *,
    workers: int,
    skip_bad: bool,
    on_skip: Callable[[str], None],
    on_progress: Callable[[int, int], None],
    shard_characters: int = SHARD_CHARACTERS,
) -> TokenCorpus:
    """The tokenised corpus of a source, made if it is not there yet.

    Args:
        root: Folder of the cache.
        source: A file of recordings, read as a stream, or a folder of them.
        recipe: Everything that decides tokens; see `corpus_key`.
        tokenise_factory: Makes what tokenises.
        workers: Processes that tokenise; 1 tokenises in this one.
        skip_bad: Whether to use the rest where records cannot be read or are refused.
        on_skip: Told why, for each of these.
        on_progress: Told after each shard how many trajectories and tokens are done.
        shard_characters: Text of a shard.

    Raises:
        UserError: A record is refused and `skip_bad` is off, nothing is left to train on, a file of
            the cache was altered, or the disk refuses.
    """
    state = _state(source)
    folder = root / corpus_key(source, recipe)
    held = hold(folder)
    if not (folder / INDEX).exists():
        with _alone(folder):
            if not (folder / INDEX).exists():
                sweep(folder)
                read = partial(read_recordings, source, skip_bad=skip_bad)
                jobs = _jobs(folder, read, shard_characters)
                with _submitter(workers, tokenise_factory, source) as submit:
                    shards = _shards(jobs, submit, workers + 1, skip_bad, on_progress)
                _check_unchanged(source, state, shards)
                write_index(folder, shards, source)
    corpus = TokenCorpus(folder, held)
    for sentence in corpus.skipped:
        if not skip_bad:
            raise UserError(sentence)
        on_skip(sentence)
    if not len(corpus):
        raise UserError(f"{source}: holds no token that could be trained; name another file.")
    return corpus


def _jobs(
    folder: Path,
    read: Callable[..., Iterable[Recording]],
    shard_characters: int,
) -> Iterator[_Job]:
    """Cuts a source into shards; where the cuts lie follows from its content alone."""
    records: list[Recording | str] = []
    number = size = 0
    for recording in read(on_skip=records.append):
        records.append(recording)
        size += _characters(recording)
        if size >= shard_characters:
            yield _Job(folder / f"{number:05d}", records.copy())
            number, size = number + 1, 0
            records.clear()
    if records:
        yield _Job(folder / f"{number:05d}", records)


def _shards(
    jobs: Iterable[_Job],
    submit: Callable[[_Job], Future[None]],
    in_flight: int,
    skip_bad: bool,
    on_progress: Callable[[int, int], None],
) -> list[Shard]:
    """Makes the shards that are not there yet, a few at a time, and gives all in order."""
    shards: list[Shard] = []
    running: deque[tuple[_Job, Future[None] | None]] = deque()
    trajectories = tokens = 0

    def finish() -> None:
        nonlocal trajectories, tokens
        shard = _finished(*running.popleft())
        if shard.skipped and not skip_bad:
            raise UserError(shard.skipped[0])
        shards.append(shard)
        trajectories += len(shard.lengths)
        tokens += int(shard.lengths[:, 1].sum())
        on_progress(trajectories, tokens)

    for job in jobs:
        running.append((job, None if job.folder.exists() else submit(job)))
        if len(running) > in_flight:
            finish()
    while running:
        finish()
    return shards


def _finished(job: _Job, future: Future[None] | None) -> Shard:
    if future is not None:
        future.result()
    shard = open_shard(job.folder)
    if future is None:
        shard.verify()
        # The source may have been written to while it was read, or be read differently by now.
        if shard.records != hash_records(job.records):
            raise spoilt(job.folder, "holds other records than belong here", job.folder.parent)
    return shard


def _characters(recording: Recording) -> int:
    return sum(
        len(message.content)
        + len(message.reasoning)
        + sum(len(str(call.arguments)) for call in message.tool_calls)
        for message in recording.messages
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a corpus's lock, waiting for it; the kernel lets go of it however a process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); free space or choose another folder."
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _state(source: Path) -> list[tuple[str, int, int]]:
    """What changes when files are written to, added or removed; of none that is not there."""
    states = []
    for file in recording_files(source):
        with suppress(OSError):
            stat = file.stat()
            states.append((str(file), stat.st_size, stat.st_mtime_ns))
    return states


def _check_unchanged(
    source: Path, state: list[tuple[str, int, int]], shards: Iterable[Shard]
) -> None:
    if _state(source) == state:
        return
    for shard in shards:
        shutil.rmtree(shard.folder)
    raise UserError(f"{source}: changed while it was read; run again when it is complete.")


@contextmanager
def _submitter(
    workers: int, factory: TokeniseFactory, source: Path
) -> Iterator[Callable[[_Job], Future[None]]]:
    """Yields what has a shard made, in other processes if there are several workers."""
    if workers == 1:
        made = cache(factory)

        def here(job: _Job) -> Future[None]:
            done: Future[None] = Future()
            write_shard(job.folder, job.records, made())
            done.set_result(None)
            return done

        yield here
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(factory,)
    )
    try:
        yield lambda job: pool.submit(_write, job)
    except BrokenProcessPool:
        raise UserError(
            f"{source}: a process that tokenised it was killed, perhaps for its memory; run again "
            "with fewer workers, which goes on where this stopped."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(factory: TokeniseFactory) -> None:
    """Prepares a process of the pool, which ends with the one that started it, even by SIGKILL."""
    global _own_tokenise
    _own_tokenise = cache(factory)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write(job: _Job) -> None:
    write_shard(job.folder, job.records, _own_tokenise())
