"""Corpora that are not used any more can be removed; those that are made or read never are."""

import gc
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cache_worker import made

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import write_text
from klong_jax.pipelines import corpora
from klong_jax.pipelines.config.commands import CorporaConfig
from klong_jax.sft.cache import corpus_key
from klong_jax.sft.corpus import TokenCorpus
from klong_jax.sft.hold import IN_USE, hold, hold_alone
from klong_jax.sft.inventory import inventory, remove

DAY = 24 * 3600


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., TokenCorpus]:
    def build(name: str, **options: object) -> TokenCorpus:
        source = tmp_path / f"{name}.jsonl"
        talk = [{"role": role, "content": f"{role} {name}"} for role in ("user", "assistant")]
        lines = (json.dumps({"id": str(number), "messages": talk}) for number in range(12))
        write_text(source, "\n".join(lines))
        return made(tmp_path / "corpora", source, tmp_path / "log", **options)  # type: ignore[arg-type]

    return build


def opened(folder: Path, days_ago: float) -> Path:
    at = time.time() - days_ago * DAY
    os.utime(folder / IN_USE, (at, at))
    return folder


def settings(root: Path, **given: object) -> CorporaConfig:
    nothing = {"older_than_days": None, "keep": None, "prune": False}
    return CorporaConfig.model_validate({"path": root, **nothing, **given})


def test_only_what_is_old_beyond_what_is_kept_and_unused_goes(
    tmp_path: Path, build: Callable[..., TokenCorpus], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "corpora"
    folders = [opened(build(f"s{n}").folder, days) for n, days in enumerate((1, 20, 30, 40, 50))]
    with pytest.raises(UserError):
        build("s5", on_progress=lambda *_: _stop())
    unfinished = opened(root / corpus_key(tmp_path / "s5.jsonl", {"tokenizer": "characters"}), 60)
    used = build("s3")
    assert used.folder == opened(folders[3], 40)
    (root / "notes").mkdir()
    left = root / f".{'0' * 64}.1.removed"
    left.mkdir()
    gc.collect()  # what nobody refers to any more lets go

    listed = inventory(root)
    assert [entry.folder for entry in listed] == [*folders, unfinished]
    assert [entry.in_use for entry in listed] == [n == 3 for n in range(6)]
    assert [entry.state for entry in listed] == ["complete"] * 5 + ["unfinished"]
    assert listed[0].source == str(tmp_path / "s0.jsonl")
    assert (listed[0].trajectories, listed[0].tokens) == (12, 12 * len("user s0assistant s0"))
    assert all(entry.bytes > 500 for entry in listed[:5])

    corpora.run(settings(root, keep=2, older_than_days=25))
    said = " ".join(capsys.readouterr().out.split())
    assert "6 corpora" in said and "may go: 3 corpora" in said
    assert len(inventory(root)) == 6 and left.exists(), "nothing was asked for yet"

    corpora.run(settings(root, keep=2, older_than_days=25, prune=True))
    assert "removed: 3 corpora" in capsys.readouterr().out
    assert {path.name for path in root.iterdir()} == {
        "notes",
        *(folders[n].name for n in (0, 1, 3)),
    }
    used.verify()
    assert len(build("s2")) == 12, "what was removed is made again"


def _stop() -> None:
    raise UserError("stop")


def test_one_that_is_being_made_is_not_removed(
    tmp_path: Path, build: Callable[..., TokenCorpus]
) -> None:
    removed: list[bool] = []

    def prune(trajectories: int, tokens: int) -> None:
        (entry,) = inventory(tmp_path / "corpora")
        assert entry.in_use
        removed.append(remove(entry))

    assert len(build("a", on_progress=prune)) == 12
    assert removed and not any(removed)


def test_who_waits_for_a_corpus_that_is_removed_holds_the_next_one(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 64)
    hold(folder).release()
    held = hold_alone(folder)
    assert held is not None and hold_alone(folder) is None
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(hold, folder)
        time.sleep(0.1)
        assert not waiting.done()
        shutil.rmtree(folder)
        held.release()
        then = waiting.result(timeout=30)
    assert folder.exists() and hold_alone(folder) is None
    then.release()
    assert hold_alone(folder) is not None


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing: cannot be listed .* name a folder of corpora"):
        corpora.run(settings(tmp_path / "missing"))
    with pytest.raises(UserError, match="prune=true: say what may go"):
        settings(tmp_path, prune=True)
