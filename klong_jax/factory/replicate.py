"""Replicate: seeded papers of constants and formulas whose components are small shell scripts.

What a component must print follows only from the paper, so an agent that no longer sees the paper
cannot build it; a task of N components needs some 2N turns, so its length is chosen freely.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klong_jax.core.errors import UserError
from klong_jax.core.rubric import parse_rubric
from klong_jax.core.task import Task
from klong_jax.factory.replicate_harness import PROBES, run_script
from klong_jax.text.tasks import save_task

COMPONENTS = range(4, 257)
_CONSTANTS = "alpha beta gamma delta kappa lambda sigma omega"
_FORMULAS = "gain blend shift scale fold drift merge probe"
# The judge's inputs are no probe of run.sh, so a table of the probes fails there; and they are
# larger than every modulus, so that a component without its modulus fails too.
_JUDGED_INPUTS = range(100, 200)
_NUMBERS = range(2, 10)
# Prime and larger than every number, so that no detail of a component cancels out.
_MODULI = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)


# How a result follows from the input x, the formula's factor f and the constant c. Each is linear
# in f and in c, so that modulo a larger prime no other number gives the same results.
_FORMS: dict[str, Callable[[int, int, int], int]] = {
    "x*f+c": lambda x, f, c: x * f + c,
    "x*f-c": lambda x, f, c: x * f - c,
    "c-x*f": lambda x, f, c: c - x * f,
    "x+f*c": lambda x, f, c: x + f * c,
    "x-f*c": lambda x, f, c: x - f * c,
    "x*c+f": lambda x, f, c: x * c + f,
    "x*c-f": lambda x, f, c: x * c - f,
    "f-x*c": lambda x, f, c: f - x * c,
}


@dataclass(frozen=True)
class Paper:
    """What a paper says.

    Attributes:
        constants: Name to value.
        formulas: Name to factor.
        form: How results follow from both.
        modulus: What every result is reduced by.
    """

    constants: dict[str, int]
    formulas: dict[str, int]
    form: str
    modulus: int

    @property
    def numbers(self) -> dict[str, int]:
        """Every name's number."""
        return {**self.constants, **self.formulas}

    def sections(self) -> tuple[str, ...]:
        """The text, in sections."""

        def table(numbers: dict[str, int]) -> list[str]:
            return [f"{name}={number}" for name, number in numbers.items()]

        return (
            "1 Overview\nEvery component is one formula applied to one constant.",
            "\n".join(("2 Constants", *table(self.constants))),
            "\n".join(("3 Formulas", *table(self.formulas))),
            f"4 Constraints\nPrint each result as echo {self._result()}",
        )

    def component(self, formula: str, constant: str) -> str:
        """A component as the paper asks for it."""
        return (
            f"x=$1;{constant}={self.constants[constant]};c=${constant};"
            f"{formula}={self.formulas[formula]};f=${formula};echo {self._result()}"
        )

    def output(self, formula: str, constant: str, x: int) -> int:
        """What a component prints for x; the remainder has the dividend's sign, as in the shell."""
        value = _FORMS[self.form](x, self.formulas[formula], self.constants[constant])
        return int(math.fmod(value, self.modulus))

    def _result(self) -> str:
        return f"$((({self.form})%{self.modulus}))"


def sample_paper(
    rng: random.Random, constants: tuple[int, int] = (4, 7), formulas: tuple[int, int] = (3, 6)
) -> Paper:
    """Draws a paper.

    Args:
        rng: Source of randomness.
        constants: Fewest and most constants.
        formulas: Fewest and most formulas.
    """

    def numbers(names: str, count: tuple[int, int]) -> dict[str, int]:
        chosen = rng.sample(names.split(), rng.randint(*count))
        return {name: rng.choice(_NUMBERS) for name in chosen}

    return Paper(
        constants=numbers(_CONSTANTS, constants),
        formulas=numbers(_FORMULAS, formulas),
        form=rng.choice(list(_FORMS)),
        modulus=rng.choice(_MODULI),
    )


def make_task(seed: int, components: int, root: Path | None = None) -> Task:
    """Makes the task that a seed and a length name; equal arguments give equal tasks.

    Args:
        seed: Chooses paper and components.
        components: How many to build, 4 to 256.
        root: Directory to write the task directory into; None writes nothing.

    Raises:
        UserError: The number of components is out of range, or the disk refuses.
    """
    if components not in COMPONENTS:
        raise UserError(
            f"components must be {COMPONENTS[0]} to {COMPONENTS[-1]}, not {components}."
        )
    rng = random.Random(f"replicate/{seed}")
    paper = sample_paper(rng)
    built = [
        (rng.choice(list(paper.formulas)), rng.choice(list(paper.constants)))
        for _ in range(components)
    ]
    salt = f"{rng.getrandbits(64):016x}"
    task_id = f"replicate-{components}-{seed}"
    official = f"https://code.example/{built[0][0]}-{built[0][1]}/official-{seed}"
    task = Task(
        task_id=task_id,
        title=f"{components} components",
        instructions=(
            f"Read sections 1 to 4, then build components 1 to {components}: "
            "write cK.sh, then sh run.sh K"
        ),
        paper=paper.sections(),
        addendum="",
        blacklist=(official,),
        rubric=parse_rubric(_rubric(paper, built, rng), task_id),
        root=Path(task_id),
        workspace={
            "run.sh": run_script(salt, components),
            "components.txt": _components_table(paper, built, salt),
        },
        finish_check="sh run.sh --finished",
    )
    if root is not None:
        task = replace(task, root=root / task_id)
        save_task(task, task.root)
    return task


def write_family(root: Path, seeds: Iterable[int], components: int) -> list[Task]:
    """Writes one task directory a seed into `root`."""
    return [make_task(seed, components, root) for seed in seeds]


def _components_table(paper: Paper, built: list[tuple[str, str]], salt: str) -> str:
    """Lines "K;formula;constant;digest"; the digest shows whether outputs are right, not which."""
    lines = []
    for number, (formula, constant) in enumerate(built, start=1):
        outputs = "".join(f" {paper.output(formula, constant, x)}" for x in PROBES)
        digest = hashlib.sha256(f"{salt} {number}{outputs}".encode()).hexdigest()[:16]
        lines.append(f"{number};{formula};{constant};{digest}\n")
    return "".join(lines)


def _rubric(paper: Paper, built: list[tuple[str, str]], rng: random.Random) -> dict[str, Any]:
    read = '[ "$(grep -xE "[1-4]" .judge/read_sections | sort -u | wc -l)" -eq 4 ]'
    # Who built nothing kept away from nothing.
    clean = "ls c*.sh >/dev/null && ! grep -qFf .judge/blacklist.txt .judge/commands.log"
    judged = [x for x in _JUDGED_INPUTS if x % paper.modulus]
    leaves = []
    for number, (formula, constant) in enumerate(built, start=1):
        inputs = rng.sample(judged, 2)
        runs = (
            f'[ "$(sh c{number}.sh {x})" = {paper.output(formula, constant, x)} ]' for x in inputs
        )
        leaves.append(
            _node(
                f"component-{number}",
                f"c{number}.sh prints {formula}({constant}) of its argument as the paper says.",
                rng.randint(1, 3),
                task_category="Code Development",
                check=f"ulimit -t 1; {' && '.join(runs)}",
            )
        )
    return _node(
        "replication",
        "The paper's components were replicated.",
        1,
        _node("reading", "The paper was read.", 5, task_category="Result Analysis", check=read),
        _node(
            "blacklist",
            "The blacklist was respected.",
            5,
            task_category="Code Execution",
            check=clean,
        ),
        _node("components", "Every component was built.", 90, *leaves),
    )


def _node(
    node_id: str,
    requirements: str,
    weight: int,
    *sub_tasks: dict[str, Any],
    task_category: str | None = None,
    check: str = "",
) -> dict[str, Any]:
    """One node as rubric.json spells it."""
    node: dict[str, Any] = {
        "id": node_id,
        "requirements": requirements,
        "weight": weight,
        "sub_tasks": list(sub_tasks),
        "task_category": task_category,
    }
    return {**node, "check": check} if check else node
