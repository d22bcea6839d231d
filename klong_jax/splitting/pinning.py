"""How much of a recording every window keeps in view: the rules of `splitting.pin`.

- `opening`: everything before the first answer, which is system prompt and task.
- `reading`: that, and the turns up to the first action that is not a reading one (see
  `klong_jax.splitting.reading`), with what they were answered.
- `turns:N`: the opening and the first N turns, with what they were answered.
- `tokens:N`: as many whole messages as fit into N tokens; behind the opening only whole turns with
  what they were answered, so that no call stands without its answer.

What the data itself says is pinned wins under every rule. By rule, the last turn is never pinned:
it is what the rest is there for.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from klong_jax.core.errors import UserError
from klong_jax.core.message import Message
from klong_jax.splitting.reading import only_reads

Rule = Literal["opening", "reading", "turns", "tokens"]
_COUNTING = ("turns", "tokens")


@dataclass(frozen=True)
class Pin:
    """A rule of pinning.

    Attributes:
        rule: Its name.
        count: The N of turns:N and tokens:N.
    """

    rule: Rule = "opening"
    count: int = 0

    @staticmethod
    def parse(text: str) -> "Pin":
        """Reads `opening`, `reading`, `turns:N` or `tokens:N`.

        Raises:
            UserError: It is none of them.
        """
        rule, colon, count = text.partition(":")
        counts = rule in _COUNTING
        if rule in get_args(Rule) and counts == bool(colon) == count.isdecimal():
            return Pin(cast(Rule, rule), int(count or 0))
        raise UserError(
            f"splitting.pin={text!r} is no rule; write opening, reading, turns:N or tokens:N."
        )


OPENING = Pin()


def pinned_messages(
    messages: Sequence[Message],
    pin: Pin,
    marked: int | None,
    tokens: Callable[[Sequence[Message]], int],
) -> int:
    """How many messages at the front every window keeps.

    Args:
        messages: The recording.
        pin: The rule.
        marked: What the data says, which wins; None where it does not say.
        tokens: Counts the tokens of messages at the front; only tokens:N calls it.
    """
    if marked is not None:
        return marked
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        return len(messages)
    match pin.rule:
        case "opening":
            return answers[0]
        case "reading":
            working = (number for number in answers if not only_reads(messages[number]))
            return next(working, answers[-1])
        case "turns":
            return answers[min(pin.count, len(answers) - 1)]
        case "tokens":
            ends = [*range(answers[0]), *answers]
            return _longest(ends, pin.count, lambda end: tokens(messages[:end]))


def _longest(ends: Sequence[int], budget: int, tokens: Callable[[int], int]) -> int:
    """The last of ascending ends whose tokens fit, found without counting far beyond it."""
    reach = 1
    while reach < len(ends) and tokens(ends[reach]) <= budget:
        reach *= 2
    fitting = bisect_right(ends, budget, lo=1, hi=min(reach + 1, len(ends)), key=tokens)
    return ends[fitting - 1]
