"""The live context: the token stream of a rollout and the window of it that the model sees.

Invariant: where the model took every context that the policy gave, the windows of the finished
trajectory are `splitting.policy.split(turns, prefix_len, policy)`, with the prefix of its windows.
So nothing here decides what a window is; it only runs the policy's tracker, turn by turn, and
commits what the tracker said once the turn has come about.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from klong_jax.agent.observation import fit
from klong_jax.agent.output import output_ids
from klong_jax.core.message import Message
from klong_jax.core.trajectory import Turn, WindowSpan
from klong_jax.llm.base import Completion, Prompt
from klong_jax.splitting.policy import ContextOverflow, ContextPolicy, WindowTracker
from klong_jax.text.dialect import Dialect, cut_marker

# Tokens for the environment's words in one turn below which an agent cannot work.
MIN_ROOM = 48


@dataclass(frozen=True)
class _Opened:
    """A turn that the model is about to take.

    Attributes:
        tracker: What the tracker will be if the turn comes about.
        suffix: The environment's tokens since the last output, the generation prompt included.
        keep_from: Where the history of its window begins in the stream.
        pinned_messages: Messages at the front that its window keeps.
    """

    tracker: WindowTracker
    suffix: tuple[int, ...]
    keep_from: int
    pinned_messages: int


class Context:
    """Everything said so far, as messages and as tokens, and the window over it.

    Attributes:
        messages: The conversation.
        turns: The turns taken.
        pinned_messages: Messages at the front that every window keeps.
    """

    def __init__(
        self,
        chat: Dialect,
        policy: ContextPolicy,
        session: str,
        opening: Sequence[Message],
        where: str,
        reading_tokens: int = 0,
    ) -> None:
        """Opens the conversation.

        Args:
            chat: The dialect.
            policy: The context policy.
            session: Names the rollout to the model.
            opening: The messages that every context begins with.
            where: Names the task in errors.
            reading_tokens: Tokens of reading that the task will pin behind the opening.

        Raises:
            UserError: What the task pins leaves no room for work.
        """
        policy = replace(policy, marker=cut_marker(chat))
        self._chat, self._policy, self._session = chat, policy, session
        self.messages = list(opening)
        self.turns: list[Turn] = []
        self._pending = chat.environment_ids(opening, after_output=False)
        self._pending_from = 0
        policy.check_prefix(len(self._pending) + reading_tokens + MIN_ROOM, where)
        self._tracker = WindowTracker(policy, len(self._pending))
        self.pinned_messages = len(opening)
        self._stream: list[int] = []
        self._pin: tuple[int, int] | None = None
        self._opened: _Opened | None = None
        self._message_at: dict[int, int] = {}
        self._overheads: dict[tuple[str, ...], int] = {}

    @property
    def spans(self) -> tuple[WindowSpan, ...]:
        """The windows so far; none before the first turn."""
        return self._tracker.spans() if self.turns else ()

    @property
    def windows_closed(self) -> int:
        """How often a new window was opened."""
        return len(self._tracker.closed)

    @property
    def room(self) -> int:
        """Environment tokens that the next turn can show, all in all."""
        cut = len(self._chat.cut_ids)
        return (
            self._policy.longest_suffix(self._tracker.prefix_len) - len(self._chat.prompt_ids) - cut
        )

    def observe(self, messages: Sequence[Message], caps: Sequence[int]) -> int:
        """Adds what the environment says to the last turn, each text cut to the room there is.

        Args:
            messages: Tool and user messages; once a turn.
            caps: Most tokens of each text.

        Returns:
            How many texts were cut.
        """
        shown, withheld = self._fitted(messages, caps, self.room), 0
        ids = self._chat.environment_ids(shown, after_output=True)
        # Only of a dialect that encodes or writes a text otherwise inside the template than alone.
        while len(ids) > self.room and any(message.content for message in shown):
            withheld += len(ids) - self.room
            shown = self._fitted(messages, caps, self.room - withheld)
            ids = self._chat.environment_ids(shown, after_output=True)
        self._pending += ids
        self.messages += shown
        return sum(a.content != b.content for a, b in zip(shown, messages, strict=True))

    def pin(self) -> None:
        """Makes everything said so far part of the pinned prefix, from the next turn on.

        Not once a window has been cut, since its siblings would differ, and not where so much was
        said on the way that no room would be left; the prefix then stays what it is.
        """
        end = len(self._stream) + len(self._pending)
        if self._tracker.uncut and self._policy.longest_suffix(end) >= MIN_ROOM:
            self._pin = end, len(self.messages)

    def open(self) -> Prompt:
        """The context of the next turn.

        Raises:
            ContextOverflow: The turn does not fit even without any history.
        """
        return self._open(self._policy)

    def open_shorter(self) -> Prompt | None:
        """The context of the next turn with at most half the history; None if there is none."""
        opened = self._must_be_open()
        suffix_end = len(self._stream) + len(opened.suffix)
        prefix_len = opened.tracker.prefix_len
        begin = max(len(self._stream), prefix_len)
        history = opened.tracker.history(begin)
        # The limit says it for an overlap in turns as well; below the history in any case.
        kept = min(history // 2, history - 1)
        limit = prefix_len + suffix_end - begin + kept + self._policy.reserve
        tight = replace(self._policy, limit=limit, overlap=min(self._policy.overlap, history // 2))
        try:
            return self._open(tight)
        except ContextOverflow:
            return None

    def close(self, completion: Completion, gen_s: float) -> Turn:
        """Commits the opened turn with what the model said.

        Args:
            completion: The model's turn; its tokens stand as they are.
            gen_s: Active seconds charged.
        """
        opened = self._must_be_open()
        output, finish = output_ids(self._chat, completion), completion.finish_reason
        suffix_end = len(self._stream) + len(opened.suffix)
        if len(output) > self._policy.reserve:
            # Only of a model that counts in other tokens: placed as the splitter will place it.
            try:
                self._place(self._policy, len(output))
            except ContextOverflow:
                output, finish = output[: self._policy.reserve], "length"
            opened = self._must_be_open()
        turn = Turn(
            suffix_ids=opened.suffix,
            output_ids=output,
            logprobs=completion.logprobs,
            spans=((0, completion.version),),
            finish_reason=finish,
            tool_calls=completion.message.tool_calls,
            gen_s=gen_s,
            wait_s=completion.wait_s,
        )
        opened.tracker.close_turn(suffix_end + len(output))
        self._tracker, self._opened, self._pin = opened.tracker, None, None
        self.pinned_messages = opened.pinned_messages
        self._stream += opened.suffix
        self._stream += output
        self.turns.append(turn)
        self._pending = list(self._chat.cut_ids) if finish == "length" else []
        self.messages.append(completion.message)
        self._pending_from = len(self.messages)
        return turn

    def add_tool_seconds(self, seconds: float) -> None:
        """Adds active seconds of tools to the last turn."""
        last = self.turns[-1]
        self.turns[-1] = replace(last, tool_s=last.tool_s + seconds)

    def _open(self, policy: ContextPolicy) -> Prompt:
        opened = self._place(policy)
        start, prefix_len = len(self._stream), opened.tracker.prefix_len
        if prefix_len > start:
            pinned = (*self._stream, *opened.suffix[: prefix_len - start])
        else:
            pinned = tuple(self._stream[:prefix_len])
        if opened.keep_from >= start:
            recent = opened.suffix[opened.keep_from - start :]
        else:
            edges = (opened.keep_from, *chain(*opened.tracker.left_out), start)
            first, *others = (
                self._stream[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)
            )
            marked = ((*policy.marker, *shown) for shown in others)
            recent = (*first, *chain(*marked), *opened.suffix)
        # A model that is told messages gets faded ones whole: it counts in tokens of its own.
        kept = self.messages[self._message_at[opened.keep_from] :]
        return Prompt(
            session=self._session,
            messages=(*self.messages[: opened.pinned_messages], *kept),
            token_ids=pinned + recent,
            prefix_len=prefix_len,
        )

    def _place(self, policy: ContextPolicy, output_len: int = 0) -> _Opened:
        tracker, pinned_messages = self._tracker.fork(), self.pinned_messages
        if self._pin:
            prefix_len, pinned_messages = self._pin
            tracker.pin(prefix_len)
        suffix = (*self._pending, *self._chat.prompt_ids)
        begin = max(len(self._stream), tracker.prefix_len)
        tracker.policy = policy
        keep_from = tracker.open_turn(begin, len(self._stream) + len(suffix), output_len)
        tracker.policy = self._policy
        first = pinned_messages if begin > len(self._stream) else self._pending_from
        self._message_at[begin] = first
        self._opened = _Opened(tracker, suffix, keep_from, pinned_messages)
        return self._opened

    def _must_be_open(self) -> _Opened:
        if self._opened is None:
            raise RuntimeError("no turn is open")
        return self._opened

    def _fitted(self, messages: Sequence[Message], caps: Sequence[int], room: int) -> list[Message]:
        """The messages, each cut to its cap and to its share of the room."""
        left = room - self._overhead(messages)
        shown = list(messages)
        # The short ones first: what they leave is the long ones'.
        order = sorted(range(len(shown)), key=lambda number: len(shown[number].content))
        for waiting, number in zip(range(len(order), 0, -1), order, strict=True):
            share = min(caps[number], left // waiting)
            text = fit(shown[number].content, share, self._chat.tokenizer)
            left -= len(self._chat.tokenizer.encode(text, specials=False)) if text else 0
            shown[number] = replace(shown[number], content=text)
        return shown

    def _overhead(self, messages: Sequence[Message]) -> int:
        """Tokens of the template around the messages."""
        roles = tuple(message.role for message in messages)
        if roles not in self._overheads:
            blank = [replace(message, content="") for message in messages]
            self._overheads[roles] = len(self._chat.environment_ids(blank, after_output=True))
        return self._overheads[roles]
