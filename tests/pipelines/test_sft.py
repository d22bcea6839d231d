"""`klong sft` on real recordings with a real tokenizer, as a user runs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from real_tokenizers import bpe

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("KLONG_SHARED", ROOT.parent / "shared")) / "data" / "trajectories"
SETTINGS = (
    *(f"model.{name}" for name in ("hidden_size=64", "num_heads=4", "head_dim=16")),
    *(
        "model.intermediate_size=128",
        "run.id=run",
        "sft.optimizer.learning_rate=0.05",
        "sft.optimizer.warmup_steps=1",
    ),
    *("splitting.context_limit=2560", "splitting.overlap=256", "splitting.reserve=256"),
    *("sft.batch=1", "sft.together=4", "sft.remat=none"),
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    bpe().save(path)
    return path


@pytest.fixture
def recordings() -> Path:
    path = SHARED / "tau-bench" / "gpt-4o-airline.json"
    if not path.exists():
        message = f"no {path}: set KLONG_SHARED"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    return path


def sft(root: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "klong_jax.cli", "sft", f"run.root={root}", *SETTINGS, *settings],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "JAX_PLATFORMS": "cpu"},
    )


def rows(root: Path) -> list[dict[str, Any]]:
    lines = (root / "run" / "sft" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_training_on_real_recordings_with_the_prefix_once_and_whole(
    tmp_path: Path, recordings: Path, tokenizer: Path
) -> None:
    corpora = tmp_path / "corpora"
    given = (f"data.path={recordings}", f"tokenizer.path={tokenizer}", f"data.cache={corpora}")
    done = sft(tmp_path / "once", *given, "sft.steps=6")
    assert done.returncode == 0, done.stderr
    assert "groups of windows compute 1536 tokens of their pinned prefix once" in done.stdout
    once = rows(tmp_path / "once")
    assert mean(row["loss"] for row in once[-3:]) < mean(row["loss"] for row in once[:2]) - 0.3
    assert max(row["windows"] for row in once) > 1
    made = {path: path.stat().st_mtime_ns for path in corpora.rglob("*") if path.name != ".use"}

    # The same corpus, the same order, the same numbers.
    done = sft(tmp_path / "whole", *given, "sft.steps=2", "sft.shared_prefix=0")
    assert done.returncode == 0, done.stderr
    assert "each has a row of its own" in " ".join(done.stdout.split())
    assert made == {path: path.stat().st_mtime_ns for path in made}
    for one, whole in zip(once, rows(tmp_path / "whole")[:1], strict=False):
        assert one["trained_tokens"] == whole["trained_tokens"]
        assert one["loss"] == pytest.approx(whole["loss"], rel=1e-4)

    (index,) = corpora.rglob("index.json")
    shard = next(index.parent.glob("*/tokens.npy"))
    shard.write_bytes(shard.read_bytes()[:-4])
    spoilt = sft(tmp_path / "spoilt", *given, "sft.steps=3")
    assert spoilt.returncode == 2
    assert spoilt.stderr.count("\n") == 1
    assert f"{shard}: has" in spoilt.stderr
    assert f"delete the folder {index.parent}" in spoilt.stderr
    assert not (tmp_path / "spoilt" / "run" / "sft").exists()
    shutil.rmtree(index.parent)


def test_a_mixture_is_trained_and_the_best_by_held_out_loss_kept(tmp_path: Path) -> None:
    paths = []
    for name, count in (("long", 3), ("chat", 8)):
        paths.append(tmp_path / f"{name}.jsonl")
        with paths[-1].open("w") as lines:
            for number in range(count):
                asked, said = f"{name} {number}?", f"{name} {number}!"
                messages = [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": said},
                ]
                lines.write(json.dumps({"messages": messages}) + "\n")
    given = (
        *(f"data.path={paths[0]}", f"data.mix=[{{path:{paths[1]},epochs:1}}]"),
        *(f"data.heldout={paths[1]}", "splitting.context_limit=600"),
        *("sft.batch=4", "sft.steps=6", "sft.save_every=1", "sft.keep_last=1", "sft.keep_best=2"),
    )
    done = sft(tmp_path / "runs", *given)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "11 of 11 windows fill at most half a row of 600 tokens: short windows share" in said
    made = rows(tmp_path / "runs")
    assert [row["windows"] for row in made] == [4] * 6
    # Four short conversations share a row; apart, each in one of 600 tokens, they would fill less.
    assert all(0.6 < row["padding_share"] < 0.95 for row in made)
    assert len(list((tmp_path / "runs" / "corpora").iterdir())) == 2
    # What is held out is shorter than a window, and every token of it stands somewhere.
    counts = {sum(n for name, n in row.items() if "heldout_tokens_from" in name) for row in made}
    assert len(counts) == 1 and counts.pop() > 8
    last = {name: loss for name, loss in made[-1].items() if "heldout_loss_from" in name}
    report = json.loads((tmp_path / "runs" / "run" / "report.json").read_text())
    assert [loss for _, loss, _ in report["loss_by_position"]] == list(last.values())
    assert "Loss along trajectories" in (tmp_path / "runs" / "run" / "report.html").read_text()
    best = sorted(made, key=lambda row: row["heldout_loss"])[:2]
    kept = (tmp_path / "runs" / "run" / "sft" / "checkpoints").iterdir()
    assert {int(path.name) for path in kept if path.name.isdecimal()} == {
        6,
        *(row["step"] for row in best),
    }


def test_what_cannot_be_trained_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "silent.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello?"}]}) + "\n")
    good = tmp_path / "good.jsonl"
    hello = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    good.write_text(json.dumps({"messages": hello}) + "\n")
    for settings, said in (
        ((f"data.path={path}",), f"{path}:1: has no assistant message"),
        ((f"data.path={path}", "data.skip_bad=true"), f"{path}: holds no token that could be"),
        ((f"data.path={path}", "sft.shared_prefix=4096"), "must be at least 0 and below"),
        ((f"data.path={path}", "sft.shared_prefix=8", "sft.together=1"), "share nothing"),
        ((f"data.path={path}", "sft.shared_prefix=some"), "sft.shared_prefix"),
        ((f"data.path={good}", f"data.mix=[{{path:{good}}}]"), "either a weight or epochs"),
        ((f"data.path={good}", f"data.mix=[{{path:{good},weight:1}}]"), "two sources are called"),
    ):
        done = sft(tmp_path / "runs", *settings)
        assert done.returncode == 2, done.stdout
        assert done.stderr.count("\n") == 1
        assert said in done.stderr
