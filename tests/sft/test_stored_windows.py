"""Windows cut from the disk equal those cut in memory, and a large corpus opens at no cost."""

import json
import os
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cache_worker import made
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message
from klong_jax.core.trajectory import Turn, Window, cut_window, token_stream
from klong_jax.sft.corpus import TokenCorpus, write_index
from klong_jax.sft.data import windows_of
from klong_jax.sft.sealed import write_sealed
from klong_jax.sft.shards import NOTES, TOKENS, TURNS, Tokenised, open_shard, write_shard
from klong_jax.sft.windows import CorpusGroups
from klong_jax.splitting.pinning import OPENING, pinned_messages
from klong_jax.splitting.policy import ContextPolicy, split
from klong_jax.text.chat import Chat
from klong_jax.text.formats import Recording, read_recordings
from klong_jax.text.tokenizer import bundled_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("KLONG_SHARED", ROOT.parent / "shared")) / "data" / "trajectories"


def pinned(recording: Recording) -> int:
    return pinned_messages(recording.messages, OPENING, recording.pinned_messages, len)


def same(stored: Window, window: Window) -> None:
    assert (stored.index, stored.prefix_len) == (window.index, window.prefix_len)
    for name in ("tokens", "trained_mask", "behaviour_logprobs", "policy_version"):
        ours, theirs = getattr(stored, name), getattr(window, name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_real_recordings_give_the_windows_of_the_path_in_memory(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        message = f"no trajectories at {SHARED}: set KLONG_SHARED"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    files = sorted(path for path in SHARED.glob("*/*") if path.stat().st_size < 100_000)
    recordings = [recording for path in files for recording in read_recordings(path)]
    chat = Chat(bundled_tokenizer())
    write_shard(
        tmp_path / "00000",
        recordings,
        lambda recording: Tokenised(*chat.turns(recording.messages, pinned(recording))),
    )
    write_index(tmp_path, [open_shard(tmp_path / "00000")], Path("x"))
    policy = ContextPolicy(12_000, 1_500, 1_000)
    groups = CorpusGroups(TokenCorpus(tmp_path), policy, 3, on_skip=lambda sentence: None)
    expected: list[Window] = []
    for recording in recordings:
        try:
            expected += windows_of(
                chat, recording.messages, pinned(recording), policy, recording.source
            )
        except UserError:
            continue
    stored = [window for group in groups for window in group]
    assert len(stored) == len(expected) > len(recordings)
    for one, window in zip(stored, expected, strict=True):
        same(one, window)


@st.composite
def tokenised(draw: st.DrawFn) -> tuple[tuple[Turn, ...], int]:
    """Turns of a few tokens, the first answer not silent, and a prefix that ends anywhere."""
    ids = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(tuple)
    restart = st.sampled_from(["", "", "the template left something out"])
    said = st.builds(Turn, ids, ids, restart=restart, trained=st.booleans())
    turns = draw(st.lists(said, min_size=1, max_size=12))
    assume(any(turn.output_ids and turn.trained for turn in turns))
    total = sum(len(turn.suffix_ids) + len(turn.output_ids) for turn in turns)
    return tuple(turns), draw(st.integers(0, min(20, total)))


@settings(max_examples=40)
@given(
    st.lists(tokenised(), min_size=1, max_size=4),
    st.integers(0, 20),
    st.integers(1, 3),
    st.sampled_from([(), (3, 1)]),
)
def test_drawn_recordings_give_the_windows_of_the_path_in_memory(
    drawn: list[tuple[tuple[Turn, ...], int]], overlap: int, most: int, fade: tuple[int, ...]
) -> None:
    policy = ContextPolicy(32 + overlap, overlap, 6, fade=fade, marker=(7,))
    recordings = [
        Recording(f"file:{number}", str(number), (Message("user", "x"),))
        for number in range(len(drawn))
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {"0": recordings[:1], "1": recordings[1:]}
        for part, records in parts.items():
            write_shard(folder / part, records, lambda r: Tokenised(*drawn[int(r.recording_id)]))
        write_index(folder, [open_shard(folder / part) for part in parts], Path("x"))
        stored = CorpusGroups(TokenCorpus(folder), policy, most)
        groups = zip(stored, stored.prefixes(), strict=True)
        for turns, prefix_len in drawn:
            stream = token_stream(turns)
            spans = split(turns, prefix_len, policy)
            windows = [cut_window(index, span, *stream) for index, span in enumerate(spans)]
            for start in range(0, len(windows), most):
                expected = windows[start : start + most]
                group, said = next(groups)
                assert said == (prefix_len, len(expected))
                for one, window in zip(group, expected, strict=True):
                    same(one, window)
        assert not list(groups)
        lengths = [len(window.tokens) for group in stored for window in group]
        assert (stored.windows, stored.short) == (
            len(lengths),
            sum(2 * length <= policy.limit for length in lengths),
        )


def write_large(folder: Path, trajectories: int, tokens: int, turns: int) -> None:
    """A corpus of one shard, whose tokens are a hole in the file."""
    shard = folder / "00000"
    shard.mkdir()
    files = {}
    for name, dtype, shape in (
        (TOKENS, "<i4", (trajectories * tokens,)),
        (TURNS, "<i8", (trajectories * turns, 3)),
    ):
        array = np.lib.format.open_memmap(shard / name, "w+", dtype, shape)
        if name == TURNS:
            array[:] = tokens // turns // 2, tokens // turns // 2, 0
        files[name] = {"bytes": (shard / name).stat().st_size, "sha256": ""}
    notes = {
        "records": "",
        "names": [(f"r{number}", "file") for number in range(trajectories)],
        "lengths": [(turns, tokens, 1000)] * trajectories,
        "skipped": [],
        "remarks": [],
        "files": files,
    }
    write_sealed(shard / NOTES, notes)
    write_index(folder, [open_shard(shard)], Path("x"))


def test_opening_takes_memory_for_trajectories_and_not_for_tokens(tmp_path: Path) -> None:
    write_large(tmp_path, trajectories=100, tokens=1_000_000, turns=100)
    tracemalloc.start()
    corpus = TokenCorpus(tmp_path)
    groups = CorpusGroups(corpus, ContextPolicy(100_000, 10_000, 5_000), 1)
    (window,) = groups[1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert corpus.total_tokens == 100_000_000 and len(groups) > 1000
    assert len(window.tokens) > 90_000
    assert peak < 8_000_000


def test_an_index_beyond_the_end_is_refused(tmp_path: Path) -> None:
    write_large(tmp_path, trajectories=2, tokens=2_000, turns=2)
    for number in (-1, 2):
        with pytest.raises(IndexError):
            TokenCorpus(tmp_path).trajectory(number)


def test_trajectories_that_do_not_fit_are_told_or_refused(tmp_path: Path) -> None:
    source = tmp_path / "demos.jsonl"
    source.write_text(
        "".join(
            json.dumps(
                {
                    "id": name,
                    "messages": [
                        {"role": "user", "content": "x" * size},
                        {"role": "assistant", "content": "yes"},
                    ],
                }
            )
            + "\n"
            for name, size in (("short", 10), ("long", 90))
        )
    )
    corpus = made(tmp_path / "cache", source, tmp_path / "log")
    told: list[str] = []
    assert len(CorpusGroups(corpus, ContextPolicy(60, 5, 5), 1, on_skip=told.append)) == 1
    (sentence,) = told
    assert sentence.startswith(f"{source}:2: the pinned prefix has 90 tokens")
    with pytest.raises(UserError, match=r"demos\.jsonl:2: the pinned prefix has 90 tokens"):
        CorpusGroups(corpus, ContextPolicy(60, 5, 5), 1)
    with pytest.raises(UserError, match=r"file fits into splitting\.context_limit=9"):
        CorpusGroups(corpus, ContextPolicy(9, 1, 2), 1, on_skip=told.append)
