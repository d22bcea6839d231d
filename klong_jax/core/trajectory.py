"""What an agent did: turns, the windows they were seen through, and the trajectory as a whole.

The tokens of a trajectory form one *stream*: the concatenation of every turn's suffix and output.
A window is a view of that stream: the pinned prefix followed by one contiguous stretch of later
tokens. So windows are stored as three positions and materialised on demand.
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np

from klong_jax.core.message import Message, ToolCall


class Status(StrEnum):
    """How a rollout ended, or that it has not."""

    DONE = "done"
    TIMEOUT = "timeout"
    SUSPENDED = "suspended"
    INFRA_FAILED = "infra_failed"


@dataclass(frozen=True)
class Turn:
    """One assistant turn and what the environment said before it.

    Attributes:
        suffix_ids: Environment tokens since the last output, the generation prompt included.
        output_ids: The tokens sampled.
        logprobs: Log-probability of each output token under the policy that sampled it; empty for
            demonstrations, whose policy is unknown.
        spans: (first output position, policy version) pairs, ascending, the first at 0.
        finish_reason: "stop" when the model ended its turn, "length" when it was cut.
        tool_calls: The calls that were parsed out of the output.
        gen_s: Active seconds of generation.
        tool_s: Active seconds of the tools that the turn called.
        wait_s: Seconds waited in queues, not active.
        restart: Why the context does not extend the one before; empty where it does. Such a turn
            begins a new window, and what is shown of earlier turns is part of its suffix.
        trained: Whether the output is trained; if not, it is context like the suffix.
    """

    suffix_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    spans: tuple[tuple[int, int], ...] = ((0, 0),)
    finish_reason: str = "stop"
    tool_calls: tuple[ToolCall, ...] = ()
    gen_s: float = 0.0
    tool_s: float = 0.0
    wait_s: float = 0.0
    restart: str = ""
    trained: bool = True

    def __post_init__(self) -> None:
        if self.logprobs and len(self.logprobs) != len(self.output_ids):
            raise ValueError(
                f"a turn has {len(self.output_ids)} output tokens but {len(self.logprobs)} logprobs"
            )

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Turn":
        """Reads what `dataclasses.asdict` wrote."""
        return Turn(
            suffix_ids=tuple(value["suffix_ids"]),
            output_ids=tuple(value["output_ids"]),
            logprobs=tuple(value["logprobs"]),
            spans=tuple((start, version) for start, version in value["spans"]),
            finish_reason=value["finish_reason"],
            tool_calls=tuple(ToolCall.from_json(call) for call in value["tool_calls"]),
            gen_s=value["gen_s"],
            tool_s=value["tool_s"],
            wait_s=value["wait_s"],
            restart=value.get("restart", ""),
            trained=value.get("trained", True),
        )


@dataclass(frozen=True)
class WindowSpan:
    """Where a window lies in its trajectory's stream.

    The window's tokens are `stream[:prefix_len] + stream[keep_from:end]` with a marker in the place
    of each stretch that is left out; output tokens from `fresh_from` on are trained here, earlier
    ones are context that another window trains.

    Attributes:
        prefix_len: Pinned tokens at the front of the stream.
        keep_from: Where the history begins.
        fresh_from: Where what is trained here begins.
        end: Where the window ends.
        left_out: (begin, end) of stretches of the history that are not shown, ascending.
        marker: Tokens that stand for each of them.
    """

    prefix_len: int
    keep_from: int
    fresh_from: int
    end: int
    left_out: tuple[tuple[int, int], ...] = ()
    marker: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        edges = (self.keep_from, *chain(*self.left_out), self.end)
        if (
            self.prefix_len > self.keep_from
            or self.fresh_from > self.end
            or any(a > b for a, b in pairwise(edges))
        ):
            raise ValueError(f"window positions out of order: {self}")

    @property
    def length(self) -> int:
        """Tokens in the window."""
        hidden = sum(end - begin - len(self.marker) for begin, end in self.left_out)
        return self.prefix_len + self.end - self.keep_from - hidden

    def positions(self) -> np.ndarray:
        """The stream positions of its tokens, int64; -1 where a marker stands."""
        marker = np.full(len(self.marker), -1)
        pieces = [np.arange(self.prefix_len)]
        begin = self.keep_from
        for end, following in self.left_out:
            pieces += [np.arange(begin, end), marker]
            begin = following
        return np.concatenate([*pieces, np.arange(begin, self.end)])

    def take(self, stream: np.ndarray, marked: Any) -> np.ndarray:
        """What a stream holds at its positions, and for each token of a marker what is given.

        Args:
            stream: One value a position.
            marked: One value, or one for each token of the marker.
        """
        view = self.positions()
        taken = np.array(stream[view])
        markers = taken[view < 0].reshape(len(self.left_out), len(self.marker))
        taken[view < 0] = np.broadcast_to(marked, markers.shape).reshape(-1)
        return taken


@dataclass(frozen=True, eq=False)
class Window:
    """What the model saw and did between two cuts of its context; arrays of one length.

    Attributes:
        index: Position among the trajectory's windows.
        prefix_len: Tokens of the pinned prefix at the front.
        tokens: int32 token ids.
        trained_mask: True where the token was sampled and is trained in this window.
        behaviour_logprobs: float32, zero where not sampled.
        policy_version: int32, the version that sampled the token, -1 where not sampled.
        end: Where it ends in the trajectory's stream. What is trained lies there in one piece, so
            that the place i of a trained token is the stream's `end - len(tokens) + i`.
    """

    index: int
    prefix_len: int
    tokens: np.ndarray
    trained_mask: np.ndarray
    behaviour_logprobs: np.ndarray
    policy_version: np.ndarray
    end: int

    def __post_init__(self) -> None:
        lengths = {
            len(array)
            for array in (
                self.tokens,
                self.trained_mask,
                self.behaviour_logprobs,
                self.policy_version,
            )
        }
        if len(lengths) != 1:
            raise ValueError(f"window {self.index} has token fields of lengths {sorted(lengths)}")


@dataclass(frozen=True)
class Trajectory:
    """One attempt of an agent at a task.

    Attributes:
        trajectory_id: Unique name; for a rollout, request id and attempt.
        task_id: The task attempted.
        messages: The conversation as text.
        turns: The conversation as tokens; empty for a recording that was never tokenised.
        spans: The windows through which the model saw it.
        status: How it ended.
        active_s: Active seconds used.
        failures: Failure category to count.
        artifact_hash: Hash of the workspace left behind, empty if none was taken.
        pinned_messages: Messages at the front that every window keeps.
    """

    trajectory_id: str
    task_id: str
    messages: tuple[Message, ...]
    turns: tuple[Turn, ...]
    spans: tuple[WindowSpan, ...]
    status: Status
    active_s: float
    failures: dict[str, int]
    artifact_hash: str = ""
    pinned_messages: int = 0

    @property
    def assistant_turns(self) -> int:
        """How often the agent spoke."""
        return sum(message.role == "assistant" for message in self.messages)

    @cached_property
    def _stream(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return token_stream(self.turns)

    @property
    def stream_len(self) -> int:
        """Tokens of the whole interaction, each counted once."""
        return len(self._stream[0])

    def windows(self) -> tuple[Window, ...]:
        """The windows, materialised."""
        return tuple(cut_window(i, span, *self._stream) for i, span in enumerate(self.spans))

    def to_json(self) -> dict[str, Any]:
        """The trajectory as a JSON object."""
        value = asdict(self)
        value["messages"] = [message.to_json() for message in self.messages]
        return value

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Trajectory":
        """Reads what `to_json` wrote."""
        return Trajectory(
            trajectory_id=value["trajectory_id"],
            task_id=value["task_id"],
            messages=tuple(Message.from_json(message) for message in value["messages"]),
            turns=tuple(Turn.from_json(turn) for turn in value["turns"]),
            spans=tuple(_span_from_json(span) for span in value["spans"]),
            status=Status(value["status"]),
            active_s=value["active_s"],
            failures=dict(value["failures"]),
            artifact_hash=value["artifact_hash"],
            pinned_messages=value["pinned_messages"],
        )


def _span_from_json(value: dict[str, Any]) -> WindowSpan:
    left_out = tuple((begin, end) for begin, end in value.get("left_out", ()))
    return WindowSpan(**{**value, "left_out": left_out, "marker": tuple(value.get("marker", ()))})


def token_stream(
    turns: tuple[Turn, ...],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lays turns end to end.

    Returns:
        tokens int32, sampled bool, logprobs float32, policy versions int32; one length.
    """
    tokens: list[int] = []
    sampled: list[bool] = []
    logprobs: list[float] = []
    versions: list[int] = []
    for turn in turns:
        quiet, spoken = len(turn.suffix_ids), len(turn.output_ids)
        tokens += turn.suffix_ids + turn.output_ids
        if not turn.trained:
            sampled += [False] * (quiet + spoken)
            logprobs += [0.0] * (quiet + spoken)
            versions += [-1] * (quiet + spoken)
            continue
        sampled += [False] * quiet + [True] * spoken
        logprobs += [0.0] * quiet + list(turn.logprobs or [0.0] * spoken)
        versions += [-1] * quiet
        starts = [start for start, _ in turn.spans] + [spoken]
        for (start, version), end in zip(turn.spans, starts[1:], strict=True):
            versions += [version] * (end - start)
    return (
        np.array(tokens, np.int32),
        np.array(sampled, bool),
        np.array(logprobs, np.float32),
        np.array(versions, np.int32),
    )


def cut_window(
    index: int,
    span: WindowSpan,
    tokens: np.ndarray,
    sampled: np.ndarray,
    logprobs: np.ndarray,
    versions: np.ndarray,
) -> Window:
    """Materialises one window of a stream."""
    return Window(
        index=index,
        prefix_len=span.prefix_len,
        tokens=span.take(tokens, span.marker),
        trained_mask=span.take(sampled, False) & (span.positions() >= span.fresh_from),
        behaviour_logprobs=span.take(logprobs, 0.0),
        policy_version=span.take(versions, -1),
        end=span.end,
    )
