"""`klong split` on real recordings: the plan adds up, and what does not fit is said."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.console import Console

from klong_jax.core.message import Message
from klong_jax.pipelines.config.training import TokenisedDataSection
from klong_jax.pipelines.split import plan_recording
from klong_jax.pipelines.tokenised import Tokeniser, tokenised_windows
from klong_jax.splitting.policy import ContextPolicy
from klong_jax.splitting.recorded import Mode, SplitOptions
from klong_jax.text.chat import Chat
from klong_jax.text.formats import Recording, detect, read_recordings, write_openai_jsonl
from klong_jax.text.tokenizer import bundled_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("KLONG_SHARED", ROOT.parent / "shared")) / "data" / "trajectories"
FILES = sorted(path for path in SHARED.glob("*/*") if path.is_file())


def need_data() -> None:
    if not FILES:
        message = f"no trajectories at {SHARED}: set KLONG_SHARED"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


def klong(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "klong_jax.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
    )


def test_the_plan_of_every_real_recording_adds_up() -> None:
    need_data()
    chat = Chat(bundled_tokenizer())
    policy = ContextPolicy(limit=16384, overlap=2048, reserve=1024)
    split = 0
    for path in FILES:
        for recording in list(read_recordings(path))[:5]:
            plan = plan_recording(chat, recording, policy)
            assert all(window.length <= policy.limit for window in plan.windows)
            assert sum(window.trained_tokens for window in plan.windows) == plan.output_tokens
            assert plan.windows[0].first_trained_turn == 0
            assert plan.windows[-1].last_trained_turn == plan.turns - 1
            split += len(plan.windows) > 1
    assert split >= 3


def long_recording() -> Recording:
    opening = (Message("system", "Be good."), Message("user", "Do it."))
    turns = [Message("assistant", "act"), Message("tool", "long " * 90)] * 4
    return Recording("f:1", "one", (*opening, *turns, Message("assistant", "done")))


@pytest.mark.parametrize("mode", ["klong", "sliding_no_pin", "truncate_tail"])
def test_training_splits_as_the_plan_says(mode: Mode, tmp_path: Path) -> None:
    chat, recording, options = Chat(bundled_tokenizer()), long_recording(), SplitOptions(mode=mode)
    policy = ContextPolicy(100, 20, 12)
    plan = plan_recording(chat, recording, policy, options)
    source = tmp_path / "one.jsonl"
    write_openai_jsonl(source, [recording])
    console = Console(record=True, width=200)
    data = tokenised_windows(
        TokenisedDataSection(
            path=source, skip_bad=False, mix=(), heldout=None, cache=None, workers=1
        ),
        Tokeniser(chat, policy, options),
        tmp_path / "corpora",
        console,
        draws=1,
        seed=0,
    )
    assert [(w.length, w.prefix_tokens, w.trained_tokens) for w in plan.windows] == [
        (len(w.tokens), w.prefix_len, int(w.trained_mask.sum()))
        for group in data.groups
        for w in group
    ]
    said = console.export_text()
    assert len(plan.cut_turns) == (0 if mode == "truncate_tail" else 4)
    assert plan.dropped_turns == (4 if mode == "truncate_tail" else 0)
    cut = f"4 turns are cut to fit, {plan.cut_tokens} tokens left out."
    assert (cut in said) == (mode != "truncate_tail")
    assert ("4 turns at the end are dropped." in said) == (mode == "truncate_tail")


def test_the_command_writes_the_plan(tmp_path: Path) -> None:
    need_data()
    source = SHARED / "tau-bench" / "gpt-4o-airline.json"
    done = klong(
        "split",
        f"data.path={source}",
        "splitting.context_limit=4096",
        "splitting.overlap=512",
        "output=plan.json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "200 trajectories" in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert len(plan["trajectories"]) == 200
    assert any(len(one["windows"]) > 1 for one in plan["trajectories"])


def test_the_corpus_is_summed_up_and_drawn(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "word " * 30}, {"role": "assistant", "content": "act"}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"messages": talk * n}) + "\n" for n in (1, 4, 9)))
    splitting = ["splitting.context_limit=200", "splitting.overlap=40", "splitting.reserve=20"]
    done = klong("split", f"data.path={path}", *splitting, "--stats", "plot=corpus.svg",
                 "output=plan.json", "windows=windows", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "plan.json").read_text())
    stats, plans = document["stats"], document["trajectories"]
    lengths = [w["length"] for plan in plans for w in plan["windows"]]
    pinned = plans[0]["windows"][0]["prefix_tokens"]
    assert stats["window_tokens"]["total"] == sum(lengths)
    assert stats["prefix_share"] == pytest.approx(pinned * len(lengths) / sum(lengths))
    assert stats["padding_share"] == pytest.approx(1 - sum(lengths) / (200 * len(lengths)))
    assert 0 <= stats["packed_padding_share"] < stats["padding_share"]
    for name in ("padding_share", "packed_padding_share"):
        assert f"{stats[name]:.1%}" in done.stdout
    assert stats["windows"]["largest"] == len(plans[2]["windows"]) > 2
    assert 1 < stats["prefix_sharing_speedup"]["qwen3_8b"] < len(lengths) / 3
    assert "3 trajectories" in done.stdout
    assert f"{stats['trained_share']:.1%}" in done.stdout
    assert "plot written to corpus.svg" in done.stdout
    written = sorted((tmp_path / "windows").iterdir())
    assert len(written) == len(lengths)
    assert detect(written[-1]) == "atif"
    drawing = ElementTree.parse(tmp_path / "corpus.svg").getroot()
    assert len(drawing.findall("{http://www.w3.org/2000/svg}svg")) == 3


def test_a_bad_line_is_named_and_can_be_skipped(tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    bad = {"messages": [{"role": "narrator", "content": "hm"}]}
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, bad, good)))
    refused = klong("split", f"data.path={path}", cwd=tmp_path)
    assert refused.returncode == 2
    assert f"{path}:2" in refused.stderr
    assert "role" in refused.stderr
    assert refused.stderr.count("\n") == 1
    used = klong("split", f"data.path={path}", "--skip-bad", cwd=tmp_path)
    assert used.returncode == 0, used.stderr
    assert "2 trajectories" in used.stdout
    assert "skipped" in used.stdout


def test_a_prefix_larger_than_the_context_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    messages = [{"role": "user", "content": "word " * 500}, {"role": "assistant", "content": "ho"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    done = klong(
        "split",
        f"data.path={path}",
        "splitting.context_limit=300",
        "splitting.overlap=10",
        "splitting.reserve=50",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "pinned prefix" in done.stderr
    assert "raise it above" in done.stderr
    assert done.stderr.count("\n") == 1
