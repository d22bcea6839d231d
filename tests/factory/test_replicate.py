import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from replicate_solver import Reader, components, solved

from klong_jax.core.errors import UserError
from klong_jax.core.rubric import category_shares, leaf_shares, parse_rubric
from klong_jax.core.task import Task
from klong_jax.factory.replicate import make_task, write_family
from klong_jax.text.tasks import load_task, load_tasks

SEEDS = st.integers(0, 2**31)


def failed_components(task: Task, files: dict[str, str]) -> set[str]:
    """Runs the component checks as the judge does, but on this host: the files are the tests'."""
    with TemporaryDirectory() as name:
        for path, text in files.items():
            Path(name, path).write_text(text)
        return {
            leaf.node_id
            for leaf in task.rubric.sub_tasks[2].leaves()
            if subprocess.run(["sh", "-c", leaf.check], cwd=name, capture_output=True).returncode
        }


class Harness:
    def __init__(self, task: Task, directory: Path) -> None:
        self.directory = directory
        for path, text in task.workspace.items():
            (directory / path).write_text(text)

    def run(self, arguments: str = "") -> tuple[int, str]:
        done = subprocess.run(
            f"sh run.sh {arguments}", shell=True, cwd=self.directory, capture_output=True, text=True
        )
        assert done.stderr == ""
        return done.returncode, done.stdout.strip()


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, count=st.integers(4, 256))
def test_a_task_is_valid_repeatable_and_survives_the_disk(seed: int, count: int) -> None:
    task = make_task(seed, count)
    assert make_task(seed, count) == task
    assert len(components(task)) == count
    assert len(list(task.rubric.leaves())) == count + 2
    assert parse_rubric(task.rubric.to_json(), "again") == task.rubric
    assert all(leaf.check for leaf in task.rubric.leaves())
    assert {leaf.weight for leaf in task.rubric.sub_tasks[2].leaves()} <= {1, 2, 3}
    with TemporaryDirectory() as name:
        saved = make_task(seed, count, Path(name))
        assert load_task(saved.root) == saved == replace(task, root=saved.root)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, count=st.integers(4, 10))
def test_every_component_follows_from_the_paper(seed: int, count: int) -> None:
    task = make_task(seed, count)
    assert failed_components(task, solved(task)) == set()


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
@example(seed=41091)  # Of one component no judged result is as large as the modulus.
def test_any_wrong_number_fails(seed: int) -> None:
    task = make_task(seed, 6)
    reader = Reader.of(task.paper)

    def off(numbers: dict[str, str]) -> dict[str, str]:
        return {name: str(int(number) % 9 + 1) for name, number in numbers.items()}

    everything = {f"component-{number}" for number in components(task)}
    for wrong in (
        replace(reader, constants=off(reader.constants)),
        replace(reader, formulas=off(reader.formulas)),
    ):
        assert failed_components(task, solved(task, wrong)) == everything
    wrong = replace(reader, result=re.sub(r"%\d+", "%211", reader.result))
    same = {f"component-{number}" for number in components(task) if unreduced(task, number)}
    assert failed_components(task, solved(task, wrong)) == everything - same


def unreduced(task: Task, number: int) -> bool:
    """Whether a component's modulus makes no difference for the inputs that the judge draws."""
    reader, (formula, constant) = Reader.of(task.paper), components(task)[number]
    (form, modulus) = re.fullmatch(r"\$\(\(\((.*)\)%(\d+)\)\)", reader.result).groups()
    numbers = {"f": int(reader.formulas[formula]), "c": int(reader.constants[constant])}
    checks = " ".join(leaf.check for leaf in task.rubric.sub_tasks[2].leaves())
    inputs = map(int, re.findall(rf"sh c{number}\.sh (\d+)", checks))
    results = [eval(form, numbers | {"x": x}) for x in inputs]
    # The shell's remainder has the sign of what is divided.
    return all(math.fmod(result, int(modulus)) == math.fmod(result, 211) for result in results)


def test_the_largest_task_can_be_solved() -> None:
    task = make_task(0, 256)
    assert failed_components(task, solved(task)) == set()


def test_the_paper_of_another_task_fails() -> None:
    task = make_task(1, 8)
    other = Reader.of(make_task(2, 8).paper)
    reader = Reader.of(task.paper)
    values, rules = list(other.constants.values()), list(other.formulas.values())
    misled = Reader(
        {name: values[i % len(values)] for i, name in enumerate(reader.constants)},
        {name: rules[i % len(rules)] for i, name in enumerate(reader.formulas)},
        other.result,
    )
    assert len(failed_components(task, solved(task, misled))) == 8


def test_the_paper_reads_as_agreed() -> None:
    overview, constants, formulas, limits = make_task(3, 8).paper
    assert overview == "1 Overview\nEvery component is one formula applied to one constant."
    assert re.fullmatch(r"2 Constants(\n[a-z]+=[2-9]){4,7}", constants)
    assert re.fullmatch(r"3 Formulas(\n[a-z]+=[2-9]){3,6}", formulas)
    assert re.fullmatch(
        r"4 Constraints\nPrint each result as echo \$\(\(\([xfc*+-]+\)%\d\d\)\)", limits
    )
    assert make_task(3, 8).instructions == (
        "Read sections 1 to 4, then build components 1 to 8: write cK.sh, then sh run.sh K"
    )


def test_seeds_give_different_papers() -> None:
    assert len({make_task(seed, 4).paper for seed in range(50)}) == 50


def test_the_workspace_gives_nothing_away() -> None:
    ours, others = make_task(4, 8), make_task(5, 8)
    lines = ours.workspace["components.txt"].splitlines()
    assert all(re.fullmatch(r"\d+;[a-z]+;[a-z]+;[0-9a-f]{16}", line) for line in lines)
    unsalted = [re.sub("salt=.*", "", task.workspace["run.sh"]) for task in (ours, others)]
    assert unsalted[0] == unsalted[1]


def test_the_root_weighs_reading_and_blacklist_five_percent() -> None:
    task = make_task(6, 16)
    shares = leaf_shares(task.rubric)
    assert (shares["0"], shares["1"]) == (0.05, 0.05)
    assert category_shares(task.rubric)["Code Development"] == pytest.approx(0.9)


def test_the_harness_leads_through_the_task(tmp_path: Path) -> None:
    task = make_task(7, 5)
    harness, files, names = Harness(task, tmp_path), solved(task), components(task)
    said = {n: f"next {n};{formula};{constant}" for n, (formula, constant) in names.items()}
    assert harness.run() == (0, said[1])
    for number in range(1, 6):
        assert harness.run("--finished") == (1, said[number])
        (tmp_path / f"c{number}.sh").write_text("echo 100\n")
        assert harness.run(str(number)) == (1, f"mismatch\n{said[number]}")
        (tmp_path / f"c{number}.sh").write_text(files[f"c{number}.sh"])
        following = said.get(number + 1, "all done")
        assert harness.run(str(number)) == (0, f"ok {number}\n{following}")
    assert harness.run() == (0, "all done")
    assert harness.run("--finished") == (0, "all done")


def test_the_harness_notices_what_is_broken_later(tmp_path: Path) -> None:
    task = make_task(8, 12)
    harness, files = Harness(task, tmp_path), solved(task)
    for number in range(1, 13):
        (tmp_path / f"c{number}.sh").write_text(files[f"c{number}.sh"])
        harness.run(str(number))
    (tmp_path / "c1.sh").write_text("echo 100\n")
    formula, constant = components(task)[1]
    assert harness.run("1") == (1, f"mismatch\nnext 1;{formula};{constant}")
    assert harness.run("12") == (0, f"ok 12\nnext 1;{formula};{constant}")
    (tmp_path / "c1.sh").unlink()
    assert harness.run("--finished")[0] == 1


@pytest.mark.parametrize("argument", ["0", "6", "1000", "01", "x", "'1;2'", "-1"])
def test_the_harness_refuses_other_arguments(tmp_path: Path, argument: str) -> None:
    code, said = Harness(make_task(9, 5), tmp_path).run(argument)
    assert code == 1
    assert said.startswith("no component ")


@pytest.mark.parametrize("count", [3, 257])
def test_other_lengths_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=r"components must be 4 to 256"):
        make_task(0, count)


def test_a_family_is_a_directory_of_tasks(tmp_path: Path) -> None:
    family = write_family(tmp_path, range(3), 4)
    assert load_tasks(tmp_path) == family
