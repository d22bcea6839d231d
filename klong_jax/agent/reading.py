"""The mandatory reading: which sections of the paper the agent has read."""

from collections.abc import Sequence
from typing import Any

from klong_jax.core.message import Message, ToolCall
from klong_jax.text.dialect import Dialect
from sandbox.client import Gates


class Reading:
    """The paper of one rollout, and what of it was read."""

    def __init__(self, paper: Sequence[str]) -> None:
        self._sections = [section.strip() for section in paper]
        self.read: set[int] = set()

    @property
    def unread(self) -> list[int]:
        """Numbers, from 1, of the sections not read yet."""
        return [n for n in range(1, len(self._sections) + 1) if n not in self.read]

    @property
    def complete(self) -> bool:
        """Whether everything was read."""
        return len(self.read) == len(self._sections)

    def gates(self, finish_check: str) -> Gates:
        """What the sandbox's service is to enforce of this, whatever the agent's tools ask."""
        return Gates(tuple(self._sections), finish_check)

    def number(self, section: Any) -> int | None:
        """The number that a call names a section by; None if there is no such section."""
        if isinstance(section, str) and section.strip().isdigit():
            section = int(section)
        if isinstance(section, bool) or not isinstance(section, int):
            return None
        return section if 1 <= section <= len(self._sections) else None

    def reminder(self) -> str:
        """One line that names what is still unread."""
        unread = self.unread
        some = ", ".join(map(str, unread[:8])) + (", ..." if len(unread) > 8 else "")
        return f"First read the paper with read_paper: section {some} unread."

    def numbers(self) -> str:
        """One line that says which sections there are."""
        return f"The paper has sections 1 to {len(self._sections)}; name one by number."

    def tokens(self, chat: Dialect) -> int:
        """Tokens that reading every section once, one a turn, adds to the context."""
        return sum(
            len(chat.prompt_ids)
            + len(chat.output_ids(_call(number)))
            + len(chat.environment_ids([Message("tool", text)], after_output=True))
            for number, text in enumerate(self._sections, start=1)
        )


def _call(section: int) -> Message:
    return Message("assistant", "", tool_calls=(ToolCall("read_paper", {"section": section}),))
