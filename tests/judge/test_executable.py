"""The judge in real sandboxes."""

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from klong_jax.core.jsonio import content_hash
from klong_jax.core.rollout import Judgement, Verdict
from klong_jax.core.rubric import parse_rubric
from klong_jax.core.task import Task
from klong_jax.core.trajectory import Status, Trajectory
from klong_jax.judge.executable import JUDGE_ID, ExecutableJudge
from sandbox.client import SandboxClient, tar_of
from sandbox.service import embedded


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with embedded("local") as url:
        yield url


def task_of(*checks: str) -> Task:
    """A task with one leaf of weight 1 for every check."""
    leaves = [
        {
            "id": f"leaf-{i}",
            "requirements": "holds",
            "weight": 1,
            "sub_tasks": [],
            "task_category": "Code Development",
            "check": check,
        }
        for i, check in enumerate(checks)
    ]
    root = {"id": "root", "requirements": "all", "weight": 1, "sub_tasks": leaves}
    return Task(
        task_id="t",
        title="t",
        instructions="",
        paper=("p",),
        addendum="",
        blacklist=(),
        rubric=parse_rubric(root, "test"),
        root=Path("t"),
    )


TRAJECTORY = Trajectory(
    trajectory_id="r1.0",
    task_id="t",
    messages=(),
    turns=(),
    spans=(),
    status=Status.TIMEOUT,
    active_s=1.0,
    failures={},
)


def judged(
    url: str,
    task: Task,
    files: Mapping[str, str] | bytes,
    evidence: Mapping[str, str] | None = None,
    leaf_timeout_s: float = 30.0,
) -> Judgement:
    artifact = files if isinstance(files, bytes) else tar_of(files)

    async def run() -> Judgement:
        async with SandboxClient(url) as client:
            judge = ExecutableJudge(client, leaf_timeout_s=leaf_timeout_s)
            judgement = await judge.judge(task, TRAJECTORY, artifact, evidence or {})
            if judgement.status is Verdict.VALID:
                assert await client.list() == [], "the judge leaves sandboxes"
            return judgement

    return asyncio.run(run())


def grades(judgement: Judgement) -> list[float]:
    assert judgement.status is Verdict.VALID, judgement.reason
    return list(judgement.leaf_grades.values())


def test_a_leaf_holds_when_its_check_succeeds(service: str) -> None:
    task = task_of("test -e a", "test -e b", "exit 0", "exit 3", "if", "x=1; [ $x = 1 ]")
    judgement = judged(service, task, {"a": ""})
    assert grades(judgement) == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert judgement.score == 0.5
    assert judgement.artifact_hash == content_hash(tar_of({"a": ""}))
    assert judgement.rubric_hash == task.rubric.content_hash
    assert judgement.judge_id == JUDGE_ID
    assert Judgement.from_json(judgement.to_json()) == judgement


def test_checks_see_the_evidence_and_keep_rubric_order(service: str) -> None:
    task = task_of("test ! -e .judge", "grep -qx 2 .judge/read_sections", "test -e .judge/none")
    judgement = judged(service, task, {}, {"read_sections": "2\n"})
    assert judgement.leaf_grades == {"0": 1.0, "1": 1.0, "2": 0.0}


def test_evidence_comes_from_the_host_only(service: str) -> None:
    task = task_of("grep -q forged .judge/log", "test -e .judge/more", "test -e kept")
    files = {".judge/log": "forged", ".judge/more": "", "kept": ""}
    assert grades(judged(service, task, files, {"log": "true"})) == [0.0, 0.0, 1.0]


TAMPER = {
    "forges every open file": (
        "for f in /proc/[0-9]*/fd/[0-9]*; do echo forged 0.0 1 ok >$f; done 2>/dev/null; exit 1"
    ),
    "repeats what the judge hears": (
        "for p in /proc/[0-9]*/fd/[13]; do timeout 0.2 cat $p >>seen; done 2>/dev/null;"
        "for p in /proc/[0-9]*/fd/[13]; do cat seen >$p; done 2>/dev/null; exit 1"
    ),
    "writes evidence": "mkdir -p .judge; echo forged >.judge/log; exit 1",
    "replaces later files": "echo exit 1 >c1.sh; exit 1",
    "kills what it can": "kill -9 -1; exit 1",
    "kills its parents": "kill -9 $PPID; exit 1",
}


@pytest.mark.parametrize("name", TAMPER)
def test_tampering_wins_nothing(service: str, name: str) -> None:
    if name == "kills what it can" and not isolated(service):
        pytest.skip("without isolation a sandbox can kill other processes of its user")
    task = task_of("sh c0.sh", "grep -q forged .judge/log", "test -e right", "test -e absent")
    judgement = judged(
        service, task, {"c0.sh": TAMPER[name], "right": ""}, {"log": "true"}, leaf_timeout_s=10
    )
    assert grades(judgement) == [0.0, 0.0, 1.0, 0.0]


def isolated(url: str) -> bool:
    async def ask() -> bool:
        async with SandboxClient(url) as client:
            return bool((await client.health())["isolation"] != "none")

    return asyncio.run(ask())


def test_the_agents_files_do_not_see_what_a_check_expects(service: str) -> None:
    spy = (
        "{ cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ; find . /tmp -type f -exec cat {} +;"
        " for f in /proc/[0-9]*/fd/*; do timeout 0.2 cat $f; done; } >/tmp/seen 2>/dev/null;"
        " cp /tmp/seen seen; echo spied"
    )
    task = task_of('[ "$(sh c0.sh)" = 713905 ]', "grep -q spied seen", "! grep -q 71390[5] seen")
    assert grades(judged(service, task, {"c0.sh": spy})) == [0.0, 1.0, 1.0]


def test_a_leaf_that_hangs_fails_alone(service: str) -> None:
    task = task_of("test -e a", "sleep 100", "test -e a", "sleep 100", "test -e a")
    judgement = judged(service, task, {"a": ""}, leaf_timeout_s=1.0)
    assert grades(judgement) == [1.0, 0.0, 1.0, 0.0, 1.0]


def test_a_leaf_without_a_check_is_no_zero(service: str) -> None:
    judgement = judged(service, task_of("true", ""), {})
    assert judgement.status is Verdict.FAILED
    assert judgement.score is None
    assert "leaf 1 (leaf-1) has no check" in judgement.reason


def test_trouble_with_the_sandbox_is_no_zero() -> None:
    with embedded("local") as url:
        pass
    judgement = judged(url, task_of("true"), {})
    assert judgement.status is Verdict.FAILED
    assert judgement.score is None
    assert judgement.reason.startswith("sandbox: ") and "does not answer" in judgement.reason


@pytest.mark.parametrize("artifact", [b"not a tar", b"not a tar, but it names .judge"])
def test_an_artifact_that_cannot_be_unpacked_is_no_zero(service: str, artifact: bytes) -> None:
    judgement = judged(service, task_of("true"), artifact)
    assert judgement.status is Verdict.FAILED
    assert "not a" in judgement.reason


def test_leaves_are_graded_once_for_equal_content() -> None:
    task, files, log = task_of("test -e a", "grep -q 1 .judge/log"), {"a": ""}, {"log": "1"}

    async def run() -> None:
        with embedded("local") as url:
            client = SandboxClient(url)
            judge = ExecutableJudge(client)
            first = await judge.judge(task, TRAJECTORY, tar_of(files), log)
        # The service is gone, so only remembered grades can answer.
        assert await judge.judge(task, TRAJECTORY, tar_of(files), log) == first
        assert first.score == 1.0
        for other in ({"b": ""}, log), (files, {"log": "2"}):
            unknown = await judge.judge(task, TRAJECTORY, tar_of(other[0]), other[1])
            assert unknown.status is Verdict.FAILED
        await client.close()

    asyncio.run(run())


def test_the_cache_is_bounded() -> None:
    async def run() -> Judgement:
        with embedded("local") as url:
            client = SandboxClient(url)
            judge = ExecutableJudge(client, cached_leaves=1)
            first = await judge.judge(task_of("true", "test 1"), TRAJECTORY, tar_of({}), {})
            assert grades(first) == [1.0, 1.0]
        again = await judge.judge(task_of("true", "test 1"), TRAJECTORY, tar_of({}), {})
        await client.close()
        return again

    assert asyncio.run(run()).status is Verdict.FAILED
