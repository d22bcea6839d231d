"""The shell script that grades leaves, and the reading of what it reports.

Leaves are graded while the agent's own programs run beside them under the same user, so:

- the script is a file that it removes before anything of the agent's runs: no command line, no
  environment and no open file holds a check or what it expects;
- a leaf's result is a secret said only then, one for a pass and another for a fail, so results
  cannot be forged by writing to the script's output, nor learned from earlier ones;
- what a leaf prints goes nowhere;
- leaves that read the host's evidence go first, and the evidence is gone when agent code runs. Such
  a leaf must name `.judge/` in its check and must not run the agent's files.

What this does not stop: the shell holds checks and secrets in its memory, and where the kernel lets
a process read the memory of another of its user (no Yama, ptrace_scope 0), a program of the agent's
that sets out to can read them. Only comparing outputs outside of the sandbox would end that.
"""

import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from klong_jax.core.rubric import RubricNode

EVIDENCE = ".judge"
_CHECKS = f"{EVIDENCE}/.checks"
# Reads the script whole, then removes it: a shell that read on while it ran would have it open.
COMMAND = f'checks=$(cat {_CHECKS}) && rm {_CHECKS} && eval "$checks"'

_HEAD = """\
exec 3>&1 >/dev/null 2>&1 </dev/null
leaf() {
  if ( eval "$3" ) 3>&-; then echo "$1"; else echo "$2"; fi >&3
}
"""


def reads_evidence(leaf: RubricNode) -> bool:
    """Whether the leaf's check looks at what the host wrote."""
    return f"{EVIDENCE}/" in leaf.check


@dataclass(frozen=True)
class GradingScript:
    """A script for some leaves, in their order.

    Attributes:
        text: What the shell runs.
        started: What it says first.
        secrets: What it says for each leaf: (passed, failed).
    """

    text: str
    started: str
    secrets: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, leaves: Sequence[RubricNode]) -> Self:
        """Writes the script; leaves that read evidence must come first."""
        started, *words = (secrets.token_hex(8) for _ in range(1 + 2 * len(leaves)))
        pairs = tuple(zip(words[::2], words[1::2], strict=True))
        evident = sum(map(reads_evidence, leaves))
        lines = [
            f"leaf {passed} {failed} {shlex.quote(leaf.check)}\n"
            for leaf, (passed, failed) in zip(leaves, pairs, strict=True)
        ]
        lines.insert(evident, f"rm -rf {EVIDENCE}\n")
        return cls(f"{_HEAD}echo {started} >&3\n{''.join(lines)}", started, pairs)

    def files(self) -> dict[str, str]:
        """Where the script lies in the sandbox."""
        return {_CHECKS: self.text}

    def results(self, stdout: str) -> list[bool] | None:
        """Reads results back.

        Returns:
            Pass or fail of the leaves from the first on, up to one that did not report because it
            ended the script or outlived it; None if the script never started.
        """
        said = set(stdout.split())
        if self.started not in said:
            return None
        results: list[bool] = []
        for passed, failed in self.secrets:
            if passed not in said and failed not in said:
                break
            results.append(passed in said)
        return results
