"""What a contender is asked for and what it answers, as one line of JSON each."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from klong_jax.models.config import DecoderConfig, DTypes, MoeConfig


@dataclass(frozen=True)
class Work:
    """A training step: the gradient of one trajectory, and AdamW's update.

    Attributes:
        prefix: Tokens that all windows begin with; not trained.
        window: Tokens of each window behind them; all trained.
        windows: How many.
    """

    prefix: int
    window: int
    windows: int = 1

    def rows(self, vocab: int) -> Iterator[Int[np.ndarray, " s"]]:
        """The windows' tokens, the same for every contender."""
        rng = np.random.default_rng(0)
        prefix = rng.integers(0, vocab, self.prefix, np.int32)
        for _ in range(self.windows):
            yield np.concatenate([prefix, rng.integers(0, vocab, self.window, np.int32)])


@dataclass(frozen=True)
class Job:
    """One measurement of one contender.

    Attributes:
        model: The decoder's numbers.
        work: The step.
        way: The contender's own settings.
        repeats: Steps whose median counts, after one that does not.
        dtypes: Of parameters and computation.
    """

    model: DecoderConfig
    work: Work
    way: dict[str, Any]
    repeats: int
    dtypes: DTypes

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Job":
        """What `to_json` wrote."""
        raw = json.loads(line)
        model = raw["model"]
        moe = MoeConfig(**model.pop("moe")) if model["moe"] else model.pop("moe")
        return cls(
            DecoderConfig(**model, moe=moe),
            Work(**raw["work"]),
            raw["way"],
            raw["repeats"],
            DTypes(**raw["dtypes"]),
        )


@dataclass(frozen=True)
class Outcome:
    """What a contender measured.

    Attributes:
        seconds: Of a step, the median; None if memory did not suffice or the contender failed.
        peak: Bytes of the device's memory at most, 0 if not told.
        loss: Of the last step, in nats: contenders learn the same.
        failure: The last line that a contender said that failed.
    """

    seconds: float | None
    peak: int = 0
    loss: float = float("nan")
    failure: str = ""


def answer(contender: Callable[[Job], Outcome]) -> None:
    """Runs the job that the command line gives and prints the outcome."""
    print(json.dumps(asdict(contender(Job.from_json(sys.argv[1])))), flush=True)
