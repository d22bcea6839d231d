"""What checks may know of how an artifact came about: the files of `.judge/`."""

import json
from collections.abc import Collection, Iterable

from klong_jax.core.message import Message
from klong_jax.core.task import Task


def collect_evidence(
    task: Task, messages: Iterable[Message], sections_read: Collection[int]
) -> dict[str, str]:
    """Files by name: the sections read, every tool call as JSON, the task's blacklist.

    Args:
        task: The task; its blacklist goes in.
        messages: The attempt; every tool call goes in, one JSON object a line.
        sections_read: Numbers, from 1, of the paper's sections that the agent read.
    """
    calls = [call.to_json() for message in messages for call in message.tool_calls]
    return {
        "read_sections": "".join(f"{number}\n" for number in sorted(sections_read)),
        "commands.log": "".join(json.dumps(call, ensure_ascii=False) + "\n" for call in calls),
        "blacklist.txt": "".join(f"{line}\n" for line in task.blacklist),
    }
