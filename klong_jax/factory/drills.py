"""Short conversations that teach to look things up: the first, general part of SFT.

KLong first activates general agentic ability on short data before it trains on long trajectories.
Here that is finding a name's value in a text and writing it down: alone, then inside a tool call.
"""

import random

from klong_jax.agent.prompts import SYSTEM
from klong_jax.core.message import Message, ToolCall
from klong_jax.factory.replicate import Paper, sample_paper


def lookup_drill(seed: int) -> tuple[Message, ...]:
    """A table of names and values, a list of names, and the answer: each name with its value."""
    rng = random.Random(f"lookup/{seed}")
    numbers = sample_paper(rng, constants=(1, 6), formulas=(1, 6)).numbers
    names = rng.sample(list(numbers), len(numbers))
    asked = [rng.choice(names) for _ in range(rng.randint(8, 16))]
    table = "\n".join(f"{name}={numbers[name]}" for name in names)
    return (
        Message("user", f"{table}\n{';'.join(asked)}"),
        Message("assistant", "\n".join(f"{name}={numbers[name]}" for name in asked)),
    )


def component_drill(seed: int, components: int = 3) -> tuple[Message, ...]:
    """A whole paper in one message, then a few components to write."""
    rng = random.Random(f"component/{seed}")
    paper = sample_paper(rng, constants=(2, 6), formulas=(1, 5))
    number = rng.randint(1, 256)
    messages = [Message("system", SYSTEM)]
    for index in range(components):
        formula, constant = rng.choice(list(paper.formulas)), rng.choice(list(paper.constants))
        wanted = f"next {number};{formula};{constant}"
        if index == 0:
            messages.append(Message("user", "\n".join((*paper.sections()[1:], wanted))))
        else:
            messages.append(Message("tool", f"ok {number - 1}\n{wanted}"))
        messages.append(_write(paper, number, formula, constant))
        number += 1
    return tuple(messages)


def _write(paper: Paper, number: int, formula: str, constant: str) -> Message:
    arguments = {"path": f"c{number}.sh", "content": paper.component(formula, constant)}
    return Message("assistant", "", tool_calls=(ToolCall("write_file", arguments),))
