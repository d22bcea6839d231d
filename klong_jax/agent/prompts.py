"""What the agent is told: the system prompt, the task, and one line for each slip."""

from klong_jax.core.message import Message
from klong_jax.core.task import Task

SYSTEM = (
    "You replicate papers. Answer each turn with one tool call.\n"
    "Tools: read_paper(section) read_file(path) write_file(path,content) bash(command) end_task()"
)
NO_CALL = "Answer with one tool call: read_paper, read_file, write_file, bash or end_task."
CUT = "The answer was too long and was cut; make it shorter."


def opening(task: Task) -> tuple[Message, ...]:
    """The messages that every context of the task begins with."""
    text = f"{task.instructions}\n\n{task.addendum}" if task.addendum else task.instructions
    return Message("system", SYSTEM), Message("user", text)
