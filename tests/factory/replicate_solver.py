"""An agent's knowledge of a Replicate paper: reads its sections, writes component scripts."""

import re
from dataclasses import dataclass

from klong_jax.core.task import Task


@dataclass(frozen=True)
class Reader:
    constants: dict[str, str]
    formulas: dict[str, str]
    result: str

    @staticmethod
    def of(sections: tuple[str, ...]) -> "Reader":
        constants = dict(line.split("=") for line in sections[1].splitlines()[1:])
        formulas = dict(line.split("=", 1) for line in sections[2].splitlines()[1:])
        result = re.search(r"echo (\$\(\(.*\)\))$", sections[3])
        assert result is not None
        return Reader(constants, formulas, result[1])

    def script(self, formula: str, constant: str) -> str:
        return (
            f"x=$1;{constant}={self.constants[constant]};c=${constant};"
            f"{formula}={self.formulas[formula]};f=${formula};echo {self.result}\n"
        )


def components(task: Task) -> dict[int, tuple[str, str]]:
    rows = (line.split(";") for line in task.workspace["components.txt"].splitlines())
    return {int(number): (formula, constant) for number, formula, constant, _ in rows}


def solved(task: Task, reader: Reader | None = None) -> dict[str, str]:
    """The workspace of an agent that built every component."""
    reader = reader or Reader.of(task.paper)
    built = {f"c{n}.sh": reader.script(*names) for n, names in components(task).items()}
    return {**task.workspace, **built}
