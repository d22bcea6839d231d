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
_CONSTANTS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu "
    "nu xi omicron pi rho sigma tau upsilon phi chi psi omega"
)
_FORMULAS = (
    "gain blend shift scale fold bend drift merge twist decay boost probe "
    "crop tilt skew warp join lift damp clip gate hash mix pool"
)
# The judge's inputs are no probe of run.sh, so a table of the probes fails there; and they are
# larger than every modulus, so that a component without its modulus fails too.
_JUDGED_INPUTS = range(100, 200)
_NUMBERS = range(2, 10)
# Prime and larger than every number, so that no detail of a component cancels out.
_MODULI = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)


@dataclass(frozen=True)
class _Form:
    """The shape of a formula in x, the constant c and a number k of its own.

    Attributes:
        text: How the paper writes it for the shell; the number follows.
        value: What it computes.
        weight: Weight of a component that uses it.
    """

    text: str
    value: Callable[[int, int, int], int]
    weight: int


_FORMS = (
    _Form("x*c+", lambda x, c, k: x * c + k, 1),
    _Form("x+c*", lambda x, c, k: x + c * k, 1),
    _Form("x*c-", lambda x, c, k: x * c - k, 1),
    _Form("c-x*", lambda x, c, k: c - x * k, 1),
    _Form("c*c+x*", lambda x, c, k: c * c + x * k, 2),
    _Form("x*x+c*", lambda x, c, k: x * x + c * k, 2),
    _Form("x*x-c*", lambda x, c, k: x * x - c * k, 2),
    _Form("c*c-x*", lambda x, c, k: c * c - x * k, 2),
)


@dataclass(frozen=True)
class Paper:
    """What a paper says.

    Attributes:
        constants: Name to value.
        formulas: Name to form and own number; no two share a form.
        modulus: What every result is reduced by.
    """

    constants: dict[str, int]
    formulas: dict[str, tuple[_Form, int]]
    modulus: int

    def entries(self) -> dict[str, str]:
        """Each name's line, as the paper's tables give it."""
        return {
            **{name: f"{name}={value}" for name, value in self.constants.items()},
            **{name: f"{name}=$(({form.text}{k}))" for name, (form, k) in self.formulas.items()},
        }

    def sections(self) -> tuple[str, ...]:
        """The text, in sections."""
        lines = self.entries()
        limit = f"Print each result modulo {self.modulus}: echo $(($result%{self.modulus}))"
        return (
            "1 Overview\nEvery component is one formula applied to one constant.",
            "\n".join(("2 Constants", *(lines[name] for name in self.constants))),
            "\n".join(("3 Formulas", *(lines[name] for name in self.formulas))),
            f"4 Constraints\n{limit}",
        )

    def component(self, formula: str, constant: str) -> str:
        """A component as the paper asks for it."""
        lines = self.entries()
        return (
            f"x=$1;{lines[constant]};c=${constant};{lines[formula]};"
            f"echo $((${formula}%{self.modulus}))"
        )

    def output(self, formula: str, constant: str, x: int) -> int:
        """What a component prints for x; the remainder has the dividend's sign, as in the shell."""
        form, k = self.formulas[formula]
        return int(math.fmod(form.value(x, self.constants[constant], k), self.modulus))


def sample_paper(
    rng: random.Random, constants: tuple[int, int] = (4, 7), formulas: tuple[int, int] = (3, 6)
) -> Paper:
    """Draws a paper.

    Args:
        rng: Source of randomness.
        constants: Fewest and most constants.
        formulas: Fewest and most formulas, at most as many as there are forms.
    """
    names = rng.sample(_CONSTANTS.split(), rng.randint(*constants))
    verbs = rng.sample(_FORMULAS.split(), rng.randint(*formulas))
    forms = rng.sample(_FORMS, len(verbs))
    return Paper(
        constants={name: rng.choice(_NUMBERS) for name in names},
        formulas={
            verb: (form, rng.choice(_NUMBERS)) for verb, form in zip(verbs, forms, strict=True)
        },
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
                paper.formulas[formula][0].weight,
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
