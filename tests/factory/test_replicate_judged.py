"""Whole Replicate tasks before the real judge in real sandboxes."""

import asyncio
from collections.abc import Collection, Iterator

import pytest
from replicate_solver import solved

from klong_jax.core.evidence import collect_evidence
from klong_jax.core.message import Message, ToolCall
from klong_jax.core.rollout import Judgement, Verdict
from klong_jax.core.task import Task
from klong_jax.core.trajectory import Status, Trajectory
from klong_jax.factory.replicate import make_task
from klong_jax.judge.executable import ExecutableJudge
from sandbox.client import SandboxClient, tar_of
from sandbox.service import embedded

ALL = (1, 2, 3, 4)
TASK = make_task(11, 8)


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with embedded("local") as url:
        yield url


def judged(
    service: str,
    files: dict[str, str],
    sections: Collection[int] = ALL,
    commands: Collection[str] = (),
    task: Task = TASK,
) -> Judgement:
    calls = tuple(ToolCall("bash", {"command": command}) for command in commands)
    trajectory = Trajectory(
        trajectory_id="r1.0",
        task_id=task.task_id,
        messages=(Message("assistant", "", tool_calls=calls),),
        turns=(),
        spans=(),
        status=Status.DONE,
        active_s=1.0,
        failures={},
    )

    async def run() -> Judgement:
        async with SandboxClient(service) as client:
            evidence = collect_evidence(task, trajectory.messages, sections)
            return await ExecutableJudge(client).judge(task, trajectory, tar_of(files), evidence)

    judgement = asyncio.run(run())
    assert judgement.status is Verdict.VALID, judgement.reason
    return judgement


@pytest.mark.parametrize("count", [8, 64])
def test_a_solved_task_scores_one(service: str, count: int) -> None:
    task = make_task(10, count)
    assert judged(service, solved(task), task=task).score == 1.0


def test_doing_nothing_scores_zero(service: str) -> None:
    assert judged(service, TASK.workspace, sections=()).score == 0.0


def test_part_of_the_work_is_part_of_the_score(service: str) -> None:
    files = solved(TASK)
    weights = [leaf.weight for leaf in TASK.rubric.sub_tasks[2].leaves()]
    for number in (2, 5):
        files[f"c{number}.sh"] = "echo 1000\n"
    expected = 0.1 + 0.9 * (1 - (weights[1] + weights[4]) / sum(weights))
    assert judged(service, files).score == pytest.approx(expected)


def test_unread_sections_cost_the_reading_leaf(service: str) -> None:
    judgement = judged(service, solved(TASK), sections=(1, 2, 4))
    assert judgement.leaf_grades["0"] == 0.0
    assert judgement.score == pytest.approx(0.95)


def test_touching_the_blacklist_costs_its_leaf(service: str) -> None:
    judgement = judged(service, solved(TASK), commands=[f"curl {TASK.blacklist[0]}"])
    assert judgement.leaf_grades["1"] == 0.0
    assert judgement.score == pytest.approx(0.95)


def test_a_table_of_the_harness_probes_earns_nothing(service: str) -> None:
    answers = "case $1 in 2) echo 1;; 7) echo 2;; 13) echo 3;; esac\n"
    files = {**TASK.workspace, **{f"c{n}.sh": answers for n in range(1, 9)}}
    assert judged(service, files).score == pytest.approx(0.1)


def test_what_the_agent_left_for_harness_and_judge_is_not_believed(service: str) -> None:
    forged = {
        ".done": "".join(f"{n}\n" for n in range(1, 9)),
        ".judge/read_sections": "1\n2\n3\n4\n",
        "run.sh": "exit 0\n",
        "components.txt": "",
    }
    assert judged(service, {**TASK.workspace, **forged}, sections=()).score == 0.0
