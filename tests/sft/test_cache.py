"""The cache of tokenised corpora: killed, raced and altered, it is complete or not there."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache_worker import Characters, made

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import read_json, write_text
from klong_jax.sft.cache import corpus_key
from klong_jax.sft.corpus import TokenCorpus
from klong_jax.sft.sealed import write_sealed
from klong_jax.sft.shards import open_shard, write_shard
from klong_jax.text.formats import read_recordings

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("cache_worker.py")


def line(name: str, turns: int = 2) -> str:
    """A recording of about fifty characters a turn."""
    messages = [
        {"role": role, "content": f"{name} {role} {number} ".ljust(25, ".")}
        for number in range(turns)
        for role in ("user", "assistant")
    ]
    return json.dumps({"id": name, "messages": messages}) + "\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "demos.jsonl"
    write_text(path, "".join(line(f"r{number}", 1 + number % 3) for number in range(12)))
    return path


def content(corpus: TokenCorpus) -> list[object]:
    """All that a corpus holds."""
    stored = [corpus.trajectory(number) for number in range(len(corpus))]
    return [
        (one.recording_id, one.prefix_len, one.turn_lengths.tolist(), one.tokens.tolist())
        for one in stored
    ]


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_corpus_holds_what_was_tokenised_and_is_made_once(tmp_path: Path, source: Path) -> None:
    log = tmp_path / "log"
    progress: list[tuple[int, int]] = []
    read_ahead: list[int] = []

    def on_progress(trajectories: int, tokens: int) -> None:
        progress.append((trajectories, tokens))
        read_ahead.append(len(log.read_text().splitlines()) - trajectories)

    corpus = made(tmp_path / "cache", source, log, on_progress=on_progress)
    assert [corpus.trajectory(n).recording_id for n in range(12)] == [f"r{n}" for n in range(12)]
    fifth = corpus.trajectory(5)
    assert fifth.source == f"{source}:6"
    assert fifth.turn_lengths.tolist() == [[25, 25]] * 3
    assert "".join(map(chr, fifth.tokens)).startswith("r5 user 0 ")
    assert fifth.prefix_len == 25 and fifth.tokens.dtype == np.int32
    assert len(list(corpus.folder.glob("0*"))) > 3
    assert progress[-1] == (12, corpus.total_tokens) and len(progress) > 3
    # Two shards, of two recordings at most.
    assert max(read_ahead) <= 4
    corpus.verify()
    again = made(tmp_path / "cache", source, log)
    assert content(again) == content(corpus)
    assert len(log.read_text().splitlines()) == 12


def test_content_and_recipe_name_a_corpus_and_the_files_name_does_not(source: Path) -> None:
    key = corpus_key(source, {"a": 1})
    assert key != corpus_key(source, {"a": 2})
    other = source.rename(source.with_name("other.jsonl"))
    assert key == corpus_key(other, {"a": 1})
    other.write_text(line("another"))
    assert key != corpus_key(other, {"a": 1})
    with pytest.raises(UserError, match=r"demos\.jsonl: cannot be read"):
        corpus_key(source, {})


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, source: Path, workers: int
) -> None:
    log, cache = tmp_path / "log", tmp_path / "cache"
    victim = start(cache, source, workers, log, 2)
    # The pipe ends when no process holds it any more, so the pool's have ended too.
    victim.communicate(timeout=60)
    assert victim.returncode == -9
    (folder,) = cache.iterdir()
    complete = sorted(folder.glob("0*"))
    assert len(complete) >= 2
    with pytest.raises(UserError, match=r"index\.json: is missing"):
        TokenCorpus(folder)
    log.write_text("")
    corpus = made(cache, source, log)
    assert corpus.folder == folder
    kept = {name for shard in complete for name, _ in open_shard(shard).names()}
    assert len(kept) >= 2 and not kept & set(log.read_text().splitlines())
    assert content(corpus) == content(made(tmp_path / "fresh", source, log))


def test_two_builds_at_once_end_with_one_corpus(tmp_path: Path, source: Path) -> None:
    write_text(source, "".join(line(f"r{number}") for number in range(60)))
    log, cache = tmp_path / "log", tmp_path / "cache"
    both = [start(cache, source, 1, log, 0) for _ in range(2)]
    folders = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (folder,) = folders
    assert len(log.read_text().splitlines()) == 60
    assert len(TokenCorpus(Path(folder))) == 60


def test_what_a_killed_process_left_half_written_is_swept_away(
    tmp_path: Path, source: Path
) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    folder = cache / corpus_key(source, {"tokenizer": "characters"})
    before = content(made(cache, source, log))
    (shard,) = folder.glob("00001")
    (folder / "index.json").unlink()
    scratch = folder / f".00001.{os.uname().nodename}.1.tmp"
    shard.rename(scratch)
    (scratch / "shard.json").write_text("{")
    assert content(made(cache, source, log)) == before
    assert shard.exists() and not scratch.exists()


def test_a_shard_that_another_process_made_first_stays(tmp_path: Path, source: Path) -> None:
    # Where the file system's locks do not reach other hosts, both make it.
    folder, log = tmp_path / "cache" / "00000", tmp_path / "log"
    records = list(read_recordings(source))
    write_shard(folder, records, Characters(log).turns)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    write_shard(folder, records, Characters(log).turns)
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_killed_worker_is_told_and_costs_only_its_shard(tmp_path: Path, source: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    with pytest.raises(UserError, match="was killed, perhaps for its memory; run again with fewer"):
        made(cache, source, log, workers=2, deadly="r11")
    assert len(made(cache, source, log)) == 12


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def other_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"<i", b"<u", 1))


def no_header(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def other_length(path: Path) -> None:
    notes = read_json(path)
    notes["body"]["lengths"][0][1] += 1
    write_text(path, json.dumps(notes))


def other_shard(path: Path) -> None:
    (path.parent / "shard.json").write_bytes(
        (path.parent.parent / "00001" / "shard.json").read_bytes()
    )


def other_version(path: Path) -> None:
    write_sealed(path, {**read_json(path)["body"], "version": 99})


@pytest.mark.parametrize(
    ("name", "spoil", "problem"),
    [
        ("00000/tokens.npy", cut, "tokens.npy: has"),
        ("00000/turns.npy", cut, "turns.npy: has"),
        ("00000/tokens.npy", Path.unlink, "tokens.npy: has 0 bytes"),
        ("00000/tokens.npy", other_header, "tokens.npy: holds uint32"),
        ("00000/turns.npy", no_header, "turns.npy: is not an array"),
        ("00000/shard.json", cut, "shard.json: is missing or is not JSON"),
        ("00000/shard.json", Path.unlink, "shard.json: is missing or is not JSON"),
        ("00000/shard.json", other_length, "shard.json: is not as it was written"),
        ("00000/shard.json", other_shard, "00000: is not the shard"),
        ("index.json", cut, "index.json: is missing or is not JSON"),
        ("index.json", other_version, "index.json: has version 99 instead of 2"),
    ],
)
def test_an_altered_file_is_named_with_the_remedy(
    tmp_path: Path, source: Path, name: str, spoil: Callable[[Path], None], problem: str
) -> None:
    folder = made(tmp_path / "cache", source, tmp_path / "log").folder
    spoil(folder / name)
    with pytest.raises(UserError) as refusal:
        made(tmp_path / "cache", source, tmp_path / "log")
    assert problem in str(refusal.value)
    assert str(refusal.value).endswith(f"; delete the folder {folder} and it is made again.")


def test_a_shard_of_other_records_is_not_taken_for_its_namesake(
    tmp_path: Path, source: Path
) -> None:
    corpus = made(tmp_path / "cache", source, tmp_path / "log")
    (corpus.folder / "index.json").unlink()
    with pytest.raises(UserError, match=r"00000: holds other records than belong here; delete"):
        made(tmp_path / "cache", source, tmp_path / "log", shard_characters=300)
    assert len(made(tmp_path / "cache", source.rename(tmp_path / "d"), tmp_path / "log")) == 12


def test_a_changed_token_is_found_by_its_checksum(tmp_path: Path, source: Path) -> None:
    corpus = made(tmp_path / "cache", source, tmp_path / "log")
    path = corpus.folder / "00001" / "tokens.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"00001/tokens\.npy: is not as it was written; delete the"):
        TokenCorpus(corpus.folder).verify()
    # A build that goes on trusts no shard that it did not write.
    (corpus.folder / "index.json").unlink()
    with pytest.raises(UserError, match=r"00001/tokens\.npy: is not as it was written; delete the"):
        made(tmp_path / "cache", source, tmp_path / "log")


@pytest.mark.parametrize("bad", ["{not json}\n", line("refused")])
def test_bad_records_are_skipped_only_where_asked(tmp_path: Path, source: Path, bad: str) -> None:
    source.write_text(line("a") + line("b") + bad + line("c"))
    cache, log = tmp_path / "cache", tmp_path / "log"
    with pytest.raises(UserError, match=r"demos\.jsonl:3: "):
        made(cache, source, log)
    told: list[list[str]] = [[], []]
    for skipped in told:
        corpus = made(cache, source, log, skip_bad=True, skipped=skipped)
    assert told[0] == told[1] and len(told[0]) == 1 and f"{source}:3: " in told[0][0]
    assert [corpus.trajectory(n).recording_id for n in range(len(corpus))] == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"demos\.jsonl:3: "):
        made(cache, source, log)


def test_a_source_without_trained_tokens_is_refused(tmp_path: Path, source: Path) -> None:
    source.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    skipped: list[str] = []
    for _ in range(2):
        with pytest.raises(UserError, match=r"demos\.jsonl: holds no token that could be trained"):
            made(tmp_path / "cache", source, tmp_path / "log", skip_bad=True, skipped=skipped)
    assert "the assistant says nothing" in skipped[0]


def test_a_source_that_grows_while_it_is_read_leaves_nothing_behind(
    tmp_path: Path, source: Path
) -> None:
    cache, log, before = tmp_path / "cache", tmp_path / "log", source.read_text()

    def grow(trajectories: int, tokens: int) -> None:
        source.write_text(before + line("late"))

    with pytest.raises(UserError, match=r"demos\.jsonl: changed while it was read"):
        made(cache, source, log, on_progress=grow)
    (folder,) = cache.iterdir()
    assert not list(folder.glob("0*"))
    source.write_text(before)
    assert len(made(cache, source, log)) == 12
