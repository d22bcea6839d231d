"""Active time: what a rollout's budget is measured in.

Only work is counted: generating tokens and running tools. Waiting for a slot, a judge or a
restarted host is not, so a suspended rollout resumes with the time it had left.
"""

from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    """Accumulates the active seconds of one rollout."""

    def active_s(self) -> float:
        """Active seconds spent so far."""
        ...

    def generated(self, tokens: int, measured_s: float) -> float:
        """Charges a generation of `tokens` that took `measured_s`; returns the seconds charged."""
        ...

    def tool(self, measured_s: float) -> float:
        """Charges one tool call that took `measured_s`; returns the seconds charged."""
        ...

    def waited(self, measured_s: float) -> float:
        """The seconds of waiting to put on record; they are never charged."""
        ...

    def affordable_tokens(self, remaining_s: float) -> int | None:
        """How many tokens fit into `remaining_s`, or None where only a deadline can tell."""
        ...


@dataclass
class WallClock:
    """Charges what was measured."""

    spent_s: float = 0.0

    def active_s(self) -> float:
        """Active seconds spent so far."""
        return self.spent_s

    def generated(self, tokens: int, measured_s: float) -> float:
        """Charges the measured seconds."""
        self.spent_s += measured_s
        return measured_s

    def tool(self, measured_s: float) -> float:
        """Charges the measured seconds."""
        self.spent_s += measured_s
        return measured_s

    def waited(self, measured_s: float) -> float:
        """The measured seconds."""
        return measured_s

    def affordable_tokens(self, remaining_s: float) -> int | None:
        """Unknown: the speed of generation is not declared."""
        return None


@dataclass
class VirtualClock:
    """Charges a declared price, so that the same seed gives the same rollout on any machine.

    Attributes:
        token_s: Seconds charged for one generated token.
        tool_s: Seconds charged for one tool call, whatever it did.
    """

    token_s: float
    tool_s: float
    spent_s: float = 0.0

    def active_s(self) -> float:
        """Virtual seconds spent so far."""
        return self.spent_s

    def generated(self, tokens: int, measured_s: float) -> float:
        """Charges `token_s` a token."""
        self.spent_s += tokens * self.token_s
        return tokens * self.token_s

    def tool(self, measured_s: float) -> float:
        """Charges `tool_s`."""
        self.spent_s += self.tool_s
        return self.tool_s

    def waited(self, measured_s: float) -> float:
        """None: how long a busy machine lets one wait is no part of a reproducible run."""
        return 0.0

    def affordable_tokens(self, remaining_s: float) -> int | None:
        """Whole tokens that fit into the remaining seconds."""
        return max(0, int(remaining_s / self.token_s)) if self.token_s > 0 else None
